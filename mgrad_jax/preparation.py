"""How raw ratings become a dataset, declared once: `mgrad_jax.data.prepare` and the command line read it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mgrad_jax.declaration import setting


@dataclass(frozen=True)
class Preparation:
    """What `mgrad_jax.data.prepare` is asked for besides what it reads and where it writes."""

    name: str | None = setting(None, "Of the dataset; the directory's name by default.", kind=str)
    # A table without a header has these three columns in this order.
    user: str | None = setting(None, "Column of the users; found by common names by default.", kind=str)
    item: str | None = setting(None, "Column of the items.", kind=str)
    rating: str | None = setting(None, "Column of the ratings.", kind=str)
    min_rating: float | None = setting(None, "Leave lower ratings out.", kind=float)
    k_core: int | None = setting(
        None, "Fewest interactions of every user and item: 5, or 1 where a split is kept.", kind=int
    )
    seed: int = setting(999, "Of the shuffle before the split.")
    header: bool | None = setting(
        None, "Whether a table has a header line; told by its looks.", kind=bool, option=("--header/--no-header",)
    )
    separator: str | None = setting(
        None, "Of a table's columns: ',', ';', '|', '::' or 'tab'; by the file's name by default.", kind=str
    )
    encoding: str = setting("utf-8", "Of the text, e.g. utf-16 or latin-1.")
    columns: tuple[str, ...] = setting(
        (), "What a table's columns hold, in order: item,user,rating,timestamp; '-' for others.", metavar="NAME,..."
    )
    new_split: bool = setting(False, "Draw a split although SOURCE has one.")
    drop_duplicates: bool = setting(False, "Of a pair in two splits, keep the row in training.")
    image_features: tuple[Path, Path] | None = setting(
        None,
        "Features (rows, dim), and a text file with the raw item id of each row.",
        kind=object,
        metavar="NPY IDS",
    )
    text_features: tuple[Path, Path] | None = setting(None, "The same of texts.", kind=object, metavar="NPY IDS")
    fill_features: bool = setting(False, "Give items without a feature the mean of the others.")
    overwrite: bool = setting(False, "Replace the dataset in DESTINATION as a whole.")

    @property
    def features(self) -> dict[str, tuple[Path, Path]]:
        """The files of features by modality."""
        files = {"image": self.image_features, "text": self.text_features}
        return {modality: pair for modality, pair in files.items() if pair is not None}
