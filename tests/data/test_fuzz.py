"""Mutated files: each loads as a strict reader of this file reads it, or is refused in one short sentence."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgrad_jax.data import load_interactions, prepare
from mgrad_jax.data.features import read_features
from mgrad_jax.data.id_maps import read_id_map
from mgrad_jax.errors import UserError

TOKENS = [
    "nan",
    "-1",
    "3.0",
    "1e3",
    "0x10",
    "1_0",
    " 3",
    '"3"',
    "",
    "٣",
    "+3",
    "9" * 25,
    "NA",
    "1e400",
    "\u00a03",
    "50000001",
]
PAIRS = [(u, (u + k) % 20) for u in range(30) for k in range(8)]
INTER = [["userID", "itemID", "x_label"]] + [[str(u), str(i), str(max(0, n % 8 - 5))] for n, (u, i) in enumerate(PAIRS)]
RAW = [["user_id", "item_id", "note"]] + [[f"u{u}", f"i{i}", "text"] for u, i in PAIRS]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    j = i + rng.randint(1, 40)
    some = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
    return rng.choice(
        [
            data[:i] + some + data[i:],
            data[:i] + data[j:],
            data[:i],
            data[:j] + data[i:],
            some,
            data[:i] + b"\0" * 3 + data[j:],
        ]
    )


def mutated_table(rng: random.Random, rows: list[list[str]], separator: str) -> bytes:
    rows = [list(row) for row in rows]
    i, c = rng.randrange(1, len(rows)), rng.randrange(3)
    match rng.randrange(17):
        case 0 | 1 | 2:
            rows[i][c] = rng.choice(TOKENS)
        case 3:
            rows[i].insert(c, "1")
        case 4:
            rows[i] = rows[i][:c]
        case 5:
            rows = [[*row, "" if n else "x"] for n, row in enumerate(rows)]
        case 6:
            rows[1:] = [[*row, ""] for row in rows[1:]]
        case 7:
            rows[i] = [*rows[i], *rows.pop(i - 1 if i > 1 else i + 1)]
        case 8:
            rows.insert(i, [" "])
        case 9:
            rows[0][c] = rng.choice(["", "user", "x"])
        case 10:
            rows[i][c] += rng.choice(["\0", "\f", "\x1a", "\u2028", '"', separator])
        case 11:
            rows = rows[1:]
        case 12:
            separator = rng.choice([",", ";", " ", "|"])
        case 13:
            rows[0].append(rows[0][c])
            rows[1:] = [[*row, row[0]] for row in rows[1:]]
    newline = rng.choice(["\n", "\n", "\r\n", "\r"])
    text = newline.join(separator.join(row) for row in rows)
    data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    return mutated_bytes(rng, data) if rng.random() < 0.3 else data


def strict(data: bytes, separator: str) -> list[list[str]]:
    """Header and rows of a table without quoting; an error where it is none."""
    lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    rows = [line.split(separator) for line in lines if line.strip(" ")]
    assert "\0" not in "".join(lines)
    assert len({len(row) for row in rows}) == 1
    return rows


def read_or_refused(read: Callable[..., Any], path: Path, *arguments: Any, **options: Any) -> Any:
    """What was read, or None; a refusal must be one short sentence that names the file."""
    try:
        return read(path, *arguments, **options)
    except UserError as error:
        message = str(error)
    assert path.name in message or path.parent.name in message
    assert len(message) < 500 + len(str(path))
    assert "\n" not in message
    assert message.endswith(".")
    return None


@pytest.mark.parametrize("seed", range(3))
def test_interactions(tmp_path: Path, seed: int) -> None:
    rng, file, read = random.Random(seed), tmp_path / "d.inter", 0
    for _ in range(120):
        data = mutated_table(rng, INTER, "\t")
        file.write_bytes(data)
        found = read_or_refused(load_interactions, file)
        if found is None:
            continue
        read += 1
        header, *rows = strict(data, "\t")
        columns = [[name.strip().lower() for name in header].index(name) for name in ("itemid", "x_label")]
        users = [position for position, name in enumerate(header) if name.strip().lower() in ("userid", "user")]
        numbers = np.array([[float(row[c]) for c in (*users, *columns)] for row in rows])
        expected = [numbers[numbers[:, 2] == label, :2].tolist() for label in range(3)]
        known = {user for user, _ in expected[0]}
        expected[1:] = [[row for row in split if row[0] in known] for split in expected[1:]]
        assert [split.tolist() for split in (found.train, found.valid, found.test)] == expected
    assert 10 < read < 110


@pytest.mark.parametrize("name", ["r.csv", "r.tsv"])
def test_raw_ratings(tmp_path: Path, name: str) -> None:
    rng, file, out, read = random.Random(name), tmp_path / name, tmp_path / "out", 0
    separator = "," if name == "r.csv" else "\t"
    for _ in range(60):
        data = mutated_table(rng, RAW, separator)
        file.write_bytes(data)
        done = read_or_refused(prepare, file, out, k_core=3)
        if done is None:
            assert not out.exists()
            continue
        read += 1
        assert done.rows_read == done.interactions + sum(done.left_out.values())
        if b'"' not in data:
            rows = strict(data, separator)
            assert done.rows_read == len(rows) - ("user" in rows[0][0])
        loaded, users, items = load_interactions(out), read_id_map(out, "user"), read_id_map(out, "item")
        assert all(name.startswith("u") for name in users[np.unique(loaded.train[:, 0])])
        assert all(name.startswith("i") for name in items[np.unique(loaded.train[:, 1])])
        shutil.rmtree(out)
    assert 5 < read < 55


def test_features(tmp_path: Path) -> None:
    rng, file = random.Random(0), tmp_path / "image_feat.npy"
    table = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    np.save(file, table)
    whole, read = file.read_bytes(), 0
    for _ in range(300):
        position = rng.randrange(200)
        data = whole[:position] + bytes([whole[position] ^ (1 << rng.randrange(8))]) + whole[position + 1 :]
        file.write_bytes(data if rng.random() < 0.7 else mutated_bytes(rng, whole[:140]) + whole[140:])
        found = read_or_refused(read_features, file, 20)
        if found is not None:
            read += 1
            np.testing.assert_array_equal(found, np.load(file))
    assert 10 < read < 290
