"""Interactions and features: validated however they are made, immutable afterwards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from mgrad_jax.data.digests import digest
from mgrad_jax.data.features import MODALITIES, check_finite, check_shape, is_mapped, looks_finite
from mgrad_jax.deprecation import renamed
from mgrad_jax.errors import UserError, shown

SPLITS = ("train", "valid", "test")
# Past this an id is taken for a raw identifier: arrays are sized by the largest id.
MAX_ID = 50_000_000

renamed(
    __name__,
    {"Batch": "mgrad_jax.data.sampling.Batch", "read_features": "mgrad_jax.data.features.read_features"},
)


class PairsInTwoSplits(UserError):
    """Pairs of a user and an item that stand in more than one split.

    Attributes:
        pairs: (n, 2), ascending.
    """

    def __init__(self, sentence: str, pairs: np.ndarray | None = None) -> None:
        super().__init__(sentence)
        self.pairs = pairs


@dataclass(frozen=True)
class Interactions:
    """A dataset: interactions in three splits, and item features.

    Every way to make one checks it: the constructor, `dataclasses.replace`, copies and pickles.

    Attributes:
        name: of the dataset.
        n_users, n_items: ids count from 0 to below these; in a file, the largest id plus one (published rule). Ids may
            be unused.
        train, valid, test: (n, 2) int32 rows (user, item) in file order, read-only; other whole numbers are converted.
            A pair may be repeated within a split, not across splits; `train` is not empty. In a file, users without
            training interactions are left out of valid and test; items without (cold items) stay.
        features: "image" and "text", where given: (n_items, dim) finite numbers, float32 from files, read-only.
        source: where it came from, for messages.

    Raises:
        UserError: one sentence that names what does not fit.
    """

    name: str
    n_users: int
    n_items: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: str = "memory"

    def __post_init__(self) -> None:
        for count in ("n_users", "n_items"):
            object.__setattr__(self, count, _count(self.source, count, getattr(self, count)))
        for split in SPLITS:
            object.__setattr__(self, split, _read_only(self._checked_pairs(split)))
        if not len(self.train):
            raise UserError(f"{self.source}: the train split is empty; give it interactions.")
        self._check_overlap()
        object.__setattr__(self, "features", MappingProxyType(self._checked_features()))
        if any(map(is_mapped, self.features.values())):
            _ = self.digest

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through the constructor: a mapping proxy itself cannot be pickled."""
        splits = (self.train, self.valid, self.test)
        return Interactions, (self.name, self.n_users, self.n_items, *splits, dict(self.features), self.source)

    @functools.cached_property
    def digest(self) -> str:
        """A digest of sizes, interactions and features.

        Tables that stay in their files are checked as they are read for it, which is once.
        """
        tables = {f"feature {modality}": table for modality, table in self.features.items()}

        def look(name: str, block: np.ndarray) -> None:
            if is_mapped(block) and not looks_finite(block) and not np.isfinite(block).all():
                check_finite(self._where(name.removeprefix("feature ")), tables[name])

        splits = {split: getattr(self, split) for split in SPLITS}
        return digest(tables | splits, f"{self.n_users} {self.n_items}", look)

    def statistics(self) -> dict[str, Any]:
        """Counts as in the paper's Table 1, and more: sparsity, interactions per user and per item, cold items."""
        splits = {split: len(getattr(self, split)) for split in SPLITS}
        total = sum(splits.values())
        pairs = np.concatenate([getattr(self, split) for split in SPLITS])
        users = np.bincount(pairs[:, 0], minlength=self.n_users)
        items = np.bincount(pairs[:, 1], minlength=self.n_items)
        return {
            "users": self.n_users,
            "items": self.n_items,
            "interactions": total,
            **splits,
            "sparsity": 1.0 - total / (self.n_users * self.n_items),
            "interactions per user (mean, median)": (float(users.mean()), float(np.median(users))),
            "interactions per item (mean, median)": (float(items.mean()), float(np.median(items))),
            "cold items (not in train)": self.n_items - len(np.unique(self.train[:, 1])),
            **{f"{name} features": table.shape[1] for name, table in self.features.items()},
        }

    def _checked_pairs(self, split: str) -> np.ndarray:
        """The rows of a split as (n, 2) int32, their ids within range."""
        pairs = np.asarray(getattr(self, split))
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise UserError(f"{self.source}: {split} has shape {shown(pairs.shape)}; give rows (user, item), (n, 2).")
        if pairs.dtype.kind not in "iu":
            raise UserError(f"{self.source}: {split} has type {shown(str(pairs.dtype))[1:-1]}; give whole numbers.")
        if len(pairs):
            # The columns apart: NumPy's extrema along the first axis are ten times slower.
            for column, (what, count) in enumerate((("user", self.n_users), ("item", self.n_items))):
                ids = pairs[:, column]
                if ids.min() < 0 or ids.max() >= count:
                    rows = np.flatnonzero((ids < 0) | (ids >= count))
                    raise UserError(
                        f"{self.source}: {split} row {rows[0]} has {what} {ids[rows[0]]}, outside of 0 to {count - 1} "
                        f"(such rows: {len(rows)}); correct the rows or n_{what}s."
                    )
        return pairs.astype(np.int32, copy=False)

    def _check_overlap(self) -> None:
        """A pair in two splits would leak the answer into training."""
        codes = [getattr(self, s)[:, 0].astype(np.int64) * self.n_items + getattr(self, s)[:, 1] for s in SPLITS]
        ordered = np.concatenate([code * 3 + label for label, code in enumerate(codes)])
        ordered.sort()
        pairs = ordered // 3
        clash = np.flatnonzero((pairs[1:] == pairs[:-1]) & (ordered[1:] != ordered[:-1]))
        if len(clash):
            twice = sorted_distinct(pairs[clash])
            raise PairsInTwoSplits(
                f"{self.source}: user {twice[0] // self.n_items} and item {twice[0] % self.n_items} stand in two "
                f"splits (such pairs: {len(twice)}); keep each pair in one split.",
                np.stack([twice // self.n_items, twice % self.n_items], axis=1),
            )

    def _checked_features(self) -> dict[str, np.ndarray]:
        features = {}
        for modality, table in dict(self.features).items():
            if modality not in MODALITIES:
                raise UserError(
                    f"{self.source}: there are no {shown(modality)} features; choose among {', '.join(MODALITIES)}."
                )
            check_shape(self._where(modality), table, self.n_items)
            if not is_mapped(table):
                check_finite(self._where(modality), table)
            features[modality] = _read_only(table)
        return features

    def _where(self, modality: str) -> str:
        return f"{self.source}: the {modality} feature table"


def _count(source: str, what: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MAX_ID + 1:
        raise UserError(f"{source}: {what} is {shown(value)}; give a whole number from 1 to {MAX_ID + 1:,}.")
    return int(value)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through; the caller's own array stays as it is."""
    view = array.view()
    view.setflags(write=False)
    return view


def distinct_pairs(pairs: np.ndarray, n_items: int) -> np.ndarray:
    """The distinct rows of an (n, 2) array of (user, item), sorted; by one sort of user * n_items + item."""
    codes = sorted_distinct(pairs[:, 0].astype(np.int64) * n_items + pairs[:, 1])
    return np.stack([codes // n_items, codes % n_items], axis=1)


def sorted_distinct(values: np.ndarray) -> np.ndarray:
    """As `np.unique` on one axis, by a sort: its hash table is ten times slower on millions of integers."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


def check_negatives(source: str, pairs: np.ndarray) -> None:
    """Refuse users who have every item that occurs in training: no negative can be drawn for them.

    Args:
        source: file or dataset, for the message.
        pairs: the distinct training pairs, see `distinct_pairs`.
    """
    candidates = np.count_nonzero(np.bincount(pairs[:, 1]))
    full = np.flatnonzero(np.bincount(pairs[:, 0]) >= candidates)
    if len(full):
        raise UserError(
            f"{source}: user {full[0]} has every training item, so that no negative can be drawn (such users: "
            f"{len(full)}); remove the user or some of its rows."
        )
