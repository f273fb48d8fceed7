"""Light graph convolution, the propagation that most of the recommenders share."""

from __future__ import annotations

from jaxtyping import Array, Float

from mgrad_jax.graph import SparseGraph, propagate_bipartite


def lightgcn_layers(
    graph: SparseGraph, users: Float[Array, "users dim"], items: Float[Array, "items dim"], n_layers: int
) -> tuple[Float[Array, "users dim"], Float[Array, "items dim"]]:
    """Mean over layers 0..L of the propagated embeddings, `1 / (L + 1) sum_l A^l x` (He et al. 2020, LightGCN).

    Args:
        graph: A, the normalised user-item graph over users, then items.
        users, items: layer 0.
        n_layers: L; 0 gives layer 0 back.
    """
    user_sum, item_sum = users, items
    for _ in range(n_layers):
        users, items = propagate_bipartite(graph, users, items)
        user_sum, item_sum = user_sum + users, item_sum + items
    return user_sum / (n_layers + 1), item_sum / (n_layers + 1)
