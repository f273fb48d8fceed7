"""Datasets made up on the spot: a demo with a planted answer, and tables of any size for benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mgrad_jax.data.interactions import Interactions, sorted_distinct


@dataclass(frozen=True)
class Size:
    """Numbers of users, items and interactions, and the widths of the features."""

    users: int
    items: int
    interactions: int
    image_dim: int = 4096
    text_dim: int = 384


# The paper's Table 1, and the TikTok set.
SIZES = {
    "tiktok": Size(9_308, 6_710, 68_722, 128, 128),
    "baby": Size(19_445, 7_050, 160_792),
    "sports": Size(35_598, 18_357, 296_337),
    "clothing": Size(39_387, 23_033, 237_488),
    "electronics": Size(192_403, 63_001, 1_689_188),
}


def demo_interactions(
    seed: int = 0, *, n_users: int = 600, n_items: int = 400, n_groups: int = 8, per_user: int = 14
) -> Interactions:
    """The embedded demo: users and items belong to taste groups, and the features show the groups through noise.

    Nine interactions in ten fall into the user's own group, popular items first, so that a model that learns the groups
    ranks far above chance (recall@20 about 20 / n_items).

    Args:
        seed: the same seed gives the same dataset.
        n_users, n_items, n_groups, per_user: sizes; an item belongs to group `item % n_groups`, a user to
            `user % n_groups`.

    Raises:
        ValueError: more items without an interaction than users; give more users or more interactions per user.
    """
    rng = np.random.default_rng(seed)
    item_group = np.arange(n_items) % n_groups
    popularity = 1.0 / (1.0 + rng.permutation(n_items)) ** 0.5
    rows = []
    for user in range(n_users):
        weight = popularity * np.where(item_group == user % n_groups, 9.0 * (n_groups - 1), 1.0)
        rows.append(rng.choice(n_items, per_user, replace=False, p=weight / weight.sum()))
    items = _cover(rng, np.stack(rows), n_items)
    features = {
        "image": _group_features(rng, item_group, 32, noise=1.0),
        "text": _group_features(rng, item_group, 16, noise=1.0),
    }
    users = np.repeat(np.arange(n_users)[:, None], per_user, axis=1)
    pairs = np.stack([users, items], axis=-1).astype(np.int32)
    held_out = max(1, per_user // 10)
    train, valid, test = np.split(pairs, [per_user - 2 * held_out, per_user - held_out], axis=1)
    train, valid, test = (part.reshape(-1, 2).copy() for part in (train, valid, test))
    return Interactions("demo", n_users, n_items, train, valid, test, features, "demo")


def _cover(rng: np.random.Generator, items: np.ndarray, n_items: int) -> np.ndarray:
    """Give every item that nobody chose to some user, as the first of the user's training items."""
    missing = np.setdiff1d(np.arange(n_items), items)
    if len(missing) > len(items):
        raise ValueError(f"{len(missing)} items have no interaction and only {len(items)} users could take one")
    users = rng.permutation(len(items))[: len(missing)]
    items[users, 0] = missing
    return items


def _group_features(rng: np.random.Generator, groups: np.ndarray, dim: int, noise: float) -> np.ndarray:
    centres = rng.normal(size=(groups.max() + 1, dim))
    features: np.ndarray = centres[groups] + noise * rng.normal(size=(len(groups), dim))
    return features.astype(np.float32)


def synthetic_interactions(
    size: Size, seed: int = 0, *, features: bool = True, name: str = "synthetic"
) -> Interactions:
    """Interactions with power-law degrees, for benchmarks of speed and memory; there is nothing to learn in them.

    Every user has at least three training interactions and every item one. Pairs are unique; a tenth each goes to
    validation and test.

    Args:
        size: e.g. `SIZES["baby"]`.
        seed: the same seed gives the same dataset.
        features: whether to make image and text features (standard normal).
        name: the dataset's name.
    """
    rng = np.random.default_rng(seed)
    codes = _unique_pairs(rng, size)
    users, items = codes // size.items, codes % size.items
    order = np.lexsort((rng.random(len(codes)), users))
    users, items = users[order], items[order]
    rank = np.arange(len(users)) - np.searchsorted(users, users)  # position within the user
    first = np.zeros(len(users), bool)  # one interaction of every item stays in training
    first[np.unique(items, return_index=True)[1]] = True
    label = np.where((rank < 3) | first, 0, rng.choice(3, len(users), p=[0.76, 0.12, 0.12]))
    pairs = np.stack([users, items], axis=1).astype(np.int32)
    train, valid, test = (pairs[label == value] for value in range(3))
    tables = {}
    if features:
        for modality, dim in (("image", size.image_dim), ("text", size.text_dim)):
            tables[modality] = rng.standard_normal((size.items, dim), np.float32)
    return Interactions(name, size.users, size.items, train, valid, test, tables, f"synthetic ({name})")


def _unique_pairs(rng: np.random.Generator, size: Size) -> np.ndarray:
    """Codes user * n_items + item of unique pairs, about `size.interactions` of them."""
    user_weight = (1.0 + rng.permutation(size.users)) ** -0.5
    item_weight = (1.0 + rng.permutation(size.items)) ** -0.7
    user_cdf, item_cdf = (np.cumsum(weight) / weight.sum() for weight in (user_weight, item_weight))

    def draw(cdf: np.ndarray, n: int) -> np.ndarray:
        return np.minimum(np.searchsorted(cdf, rng.random(n)), len(cdf) - 1)

    # Three for every user and one for every item first, then the rest by popularity.
    users = [np.repeat(np.arange(size.users), 4), draw(user_cdf, size.items)]
    items = [draw(item_cdf, 4 * size.users), np.arange(size.items)]
    codes = sorted_distinct(np.concatenate(users).astype(np.int64) * size.items + np.concatenate(items))
    while (missing := size.interactions - len(codes)) > 0:
        more = draw(user_cdf, missing).astype(np.int64) * size.items + draw(item_cdf, missing)
        codes = sorted_distinct(np.concatenate([codes, more]))
    return codes
