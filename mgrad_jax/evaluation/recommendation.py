"""What to show to users: lists of new items as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from mgrad_jax.data import Interactions
from mgrad_jax.errors import UserError, shown
from mgrad_jax.evaluation.ranking import top_items


def recommend(
    user_vectors: Float[Array, "users dim"],
    item_vectors: Float[Array, "items dim"],
    data: Interactions,
    users: Sequence[int] | np.ndarray | None = None,
    k: int = 20,
) -> pd.DataFrame:
    """The best new items of users, their training items left out.

    Args:
        user_vectors, item_vectors: whose products are the scores: `model.embed()`, or `vectors()` of a run from
            `mgrad_jax.training.run.load_run`.
        data: what the model was trained on.
        users: ids, in the order of the lists; all users by default.
        k: the most items per user.

    Returns:
        The columns user, rank (from 1), item and score; a user with fewer than k new items has a shorter list. With
        `mgrad_jax.data.id_maps`, `in_raw_ids(table, raw_ids(data))` has the names of the raw data instead of ids.

    Raises:
        UserError: vectors that are not those of the data's users and items, an id that is no user's, or k below 1.

    >>> import jax.numpy as jnp
    >>> from mgrad_jax.data import Interactions
    >>> pairs = np.array([[0, 0], [1, 1], [1, 2]])
    >>> data = Interactions("example", n_users=2, n_items=3, train=pairs, valid=pairs[:0], test=pairs[:0])
    >>> print(recommend(jnp.eye(2, 3), jnp.eye(3), data).to_string(index=False))
     user  rank  item  score
        0     1     1    0.0
        0     2     2    0.0
        1     1     0    0.0
    """
    sizes = len(user_vectors), len(item_vectors)
    if sizes != (data.n_users, data.n_items):
        raise UserError(
            f"the vectors are of {sizes[0]} users and {sizes[1]} items, and {data.source} has {data.n_users} and "
            f"{data.n_items}; give those of a model of these data."
        )
    chosen = np.arange(data.n_users) if users is None else np.atleast_1d(np.asarray(users))
    if chosen.size == 0:
        chosen = chosen.astype(int)
    is_user = np.issubdtype(chosen.dtype, np.integer) & np.isin(chosen, np.arange(data.n_users))
    if not is_user.all():
        stranger = chosen[~is_user].tolist()[0]
        raise UserError(f"{shown(stranger)} is no user of {data.source}; give ids from 0 to {data.n_users - 1}.")
    if k < 1:
        raise UserError(f"k is {shown(k)}; it must be at least 1.")
    items, scores = top_items(user_vectors, item_vectors, data.train, chosen, k)
    length = items.shape[1]
    table = pd.DataFrame(
        {
            "user": np.repeat(chosen, length),
            "rank": np.tile(np.arange(1, length + 1), len(chosen)),
            "item": items.ravel(),
            "score": scores.ravel(),
        }
    )
    lists: pd.DataFrame = table[np.isfinite(table["score"])].reset_index(drop=True)
    return lists
