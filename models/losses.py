"""Pieces of the training losses, shared by the models. `difference` is score(positive) - score(negative), (B,)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mgrad_jax.data import Batch


def bpr_loss(difference: Float[Array, " batch"]) -> Float[Array, ""]:
    """Bayesian personalised ranking, mean of -log sigmoid(difference) (Rendle et al. 2009)."""
    return jnp.mean(jax.nn.softplus(-difference))


def bpr_loss_sum(difference: Float[Array, " batch"]) -> Float[Array, ""]:
    """Sum of -log sigmoid(difference), the form LayerGCN publishes."""
    return jnp.sum(jax.nn.softplus(-difference))


def bpr_loss_clipped(difference: Float[Array, " batch"]) -> Float[Array, ""]:
    """Mean of -log(1e-10 + sigmoid(difference)); it never exceeds 23.03 (VBPR and LightGCN in the reference code)."""
    return -jnp.mean(jnp.log(1e-10 + jax.nn.sigmoid(difference)))


def bpr_loss_log2(difference: Float[Array, " batch"]) -> Float[Array, ""]:
    """Mean of -log2 sigmoid(difference) (DualGNN and DRAGON in the reference code)."""
    return bpr_loss(difference) / jnp.log(jnp.asarray(2.0, difference.dtype))


def safe_norm(x: Float[Array, "... dim"], axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """Euclidean norm whose gradient at zero is zero, as PyTorch's; `jnp.linalg.norm` gives NaN there."""
    squares = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def embedding_norm(*tables: Float[Array, "_ dim"]) -> Float[Array, ""]:
    """Sum of the tables' Frobenius norms, not squared, over the rows of the last table (reference EmbLoss)."""
    total = sum((safe_norm(table) for table in tables), jnp.zeros((), tables[-1].dtype))
    return total / tables[-1].shape[0]


def l2_penalty(*tables: Float[Array, "_ dim"]) -> Float[Array, ""]:
    """Half the sum of squares of all entries (reference L2Loss)."""
    return 0.5 * sum((jnp.sum(table * table) for table in tables), jnp.zeros((), tables[-1].dtype))


def mean_squares(nodes: Float[Array, "nodes dim"], n_users: int, batch: Batch) -> Float[Array, ""]:
    """Half the mean of 2 E_u^2 + E_i^2 + E_j^2 over a batch, of a table of users, then items (MMGCN and GRCN)."""
    squares = nodes**2
    users, items = squares[:n_users], squares[n_users:]
    return 0.5 * jnp.mean(2 * users[batch.users] + items[batch.positives] + items[batch.negatives])


def normalize(x: Float[Array, "rows dim"], eps: float = 1e-12) -> Float[Array, "rows dim"]:
    """Rows of unit length; rows shorter than `eps` are divided by `eps`."""
    return x / jnp.maximum(safe_norm(x, axis=-1, keepdims=True), eps)


def cosine(a: Float[Array, "rows dim"], b: Float[Array, "rows dim"], eps: float = 1e-8) -> Float[Array, " rows"]:
    """Row-wise cosine similarity, each norm clamped to at least `eps` by itself."""
    return jnp.sum(normalize(a, eps) * normalize(b, eps), axis=-1)


def cosine_alignment(online: Float[Array, "rows dim"], target: Float[Array, "rows dim"]) -> Float[Array, ""]:
    """1 - mean cosine similarity: pulls the online view towards the target view (Zhou et al. 2023, BM3)."""
    return 1.0 - jnp.mean(cosine(online, target))


def info_nce(logits: Float[Array, "rows rows"]) -> Float[Array, ""]:
    """Mean cross-entropy of the diagonal: each row's own partner among the batch's (SLMRec)."""
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.diagonal(logits))
