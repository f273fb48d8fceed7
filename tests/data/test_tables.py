"""Text tables: every field in its column, every row counted, each fault with its line and a remedy that mends it."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mgrad_jax.data import load_interactions, prepare
from mgrad_jax.data.tables import Form, first_row, line_of, read_columns
from mgrad_jax.errors import UserError

PAIRS = [(u, (u + k) % 8) for u in range(10) for k in range(6)]


def table(header: str | None, row: str, file: Path) -> Path:
    """A rating file; `row` is formatted with u, i and n, the row's number."""
    lines = [header] if header is not None else []
    lines += [row.format(u=u, i=i, n=n) for n, (u, i) in enumerate(PAIRS)]
    file.write_text("\n".join(lines) + "\n")
    return file


def raw_ids(destination: Path, kind: str) -> list[str]:
    lines = (destination / f"{kind}_map.tsv").read_text().splitlines()[1:]
    return [line.split("\t")[0] for line in lines]


def column(file: Path, form: Form, *columns: int) -> list[list[str]]:
    top = first_row(file, form)
    assert top is not None
    found = read_columns(file, form, len(top[1]), columns, 0)
    assert found is not None
    return [list(values) for values in found]


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", "::", " ", "€"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", "{newline}", "{newline}  {newline}"])
def test_fields_stay_in_their_columns(tmp_path: Path, separator: str, newline: str, blank: str) -> None:
    rows = [["a", "b", "c"], ["1", "", "ü"], ["x_y", "NA", "3'"]]
    text = (newline + blank.format(newline=newline)).join(separator.join(row) for row in rows)
    file = tmp_path / "t"
    file.write_bytes(text.encode())
    assert column(file, Form(separator), 0, 2) == [[row[0] for row in rows], [row[2] for row in rows]]
    assert [line_of(file, Form(separator), row, 0) for row in (0, 1)] == [1, 2 + blank.count("newline")]


def test_quotes_are_text_between_tabs_and_quoting_between_commas(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('a\t"b\nc\td"\n')
    assert column(tmp_path / "t", Form(), 1) == [['"b', 'd"']]
    (tmp_path / "c").write_text('"a,1","b ""x"""\nc,"d\ne"\n')
    assert column(tmp_path / "c", Form(","), 0, 1) == [["a,1", "c"], ['b "x"', "d\ne"]]
    assert line_of(tmp_path / "c", Form(","), 1, 0) == 2


def test_a_long_table_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgrad_jax.data.tables._BLOCK", 7)
    file = table("user_id,item_id", "u{u},i{i}", tmp_path / "r.csv")
    found = read_columns(file, Form(","), 2, [0, 1], 1)
    assert found is not None
    assert [*zip(*found, strict=True)] == [(f"u{u}", f"i{i}") for u, i in PAIRS]


RAGGED = {
    "a comma at the end": ("u{u},i{i},5,", "line 2 has 4 fields and the header 3 .*60 of 60.* at the end of the rows"),
    "a forgotten name": ("u{u},i{i},5,7", "line 2 has 4 fields and the header 3 .*name every column in the header"),
    "too few": ("u{u},i{i}", "line 2 has 2 fields and the header 3 .*complete or remove the line"),
}


@pytest.mark.parametrize("case", RAGGED)
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path: Path, case: str) -> None:
    row, message = RAGGED[case]
    with pytest.raises(UserError, match=message):
        prepare(table("user_id,item_id,rating", row, tmp_path / "r.csv"), tmp_path / "out")


def test_a_lost_line_break_is_refused_by_its_line(tmp_path: Path) -> None:
    lines = table("userID\titemID\tx_label", "{u}\t{i}\t0", tmp_path / "d.inter").read_text().splitlines()
    lines[5:7] = [f"{lines[5]}\t{lines[6]}"]
    (tmp_path / "d.inter").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"line 6 has 6 fields and the header 3 \(such lines: 1 of 59\); a line break"):
        load_interactions(tmp_path)


# Which column is what


def test_amazons_order_of_2018_is_told_by_its_looks(tmp_path: Path) -> None:
    done = prepare(table(None, "B{i:09d},A{u:013d},5.0,15", tmp_path / "r.csv"), tmp_path / "out")
    assert raw_ids(tmp_path / "out", "user")[0] == "A0000000000000"
    assert "Amazon" in done.columns["user"]


def test_positions_are_told_where_there_is_no_header(tmp_path: Path) -> None:
    file = table(None, "u{u},i{i},5.0,1500000000", tmp_path / "r.csv")
    assert "column 1 (by position" in prepare(file, tmp_path / "out").columns["user"]
    done = prepare(file, tmp_path / "other", columns=["item", "user", "-", "timestamp"])
    assert raw_ids(tmp_path / "other", "user")[0] == "i0"
    assert done.columns["user"] == "column 2 (as --columns says)"


AMBIGUOUS = {
    "two users": (
        "user_id,uid,item_id",
        "{u},{u},{i}",
        "r.csv",
        "'user_id' and 'uid' may both hold the users; .*--user",
    ),
    "two items": ("user_id,asin,parent_asin", "{u},{i},{i}", "r.csv", "may both hold the items; name one with --item"),
    "a name twice": ("user_id,item_id,note,note", "{u},{i},1,2", "r.csv", "column 'note' stands there twice"),
    "ratings in second place": (None, "u{u},5,i{i}", "r.csv", "column 2 looks like no id"),
    "times first": (None, "1500000000,u{u},i{i}", "r.csv", "column 1 looks like no id.*--columns"),
    "semicolons": ("user_id;item_id", "{u};{i}", "r.csv", "but semicolons; add --separator ';'"),
    "ids in quotes": ("user_id\titem_id", '"{u}"\t"{i}"', "r.tsv", "no quoting.*remove the quotation marks"),
    "only a user": ("user_id,note", "{u},{i}", "r.csv", "known to hold the item; it has user_id, note: name one"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_no_column_is_guessed_in_silence(tmp_path: Path, case: str) -> None:
    header, row, name, message = AMBIGUOUS[case]
    with pytest.raises(UserError, match=message):
        prepare(table(header, row, tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_given_by_hand_do_not_contradict_the_header(tmp_path: Path) -> None:
    file = table("user_id,item_id", "{u},{i}", tmp_path / "r.csv")
    with pytest.raises(UserError, match="--columns calls a column 'item' that the header calls 'user_id'"):
        prepare(file, tmp_path / "out", columns=["item", "user"])


# Headers of .inter files, and remedies that mend them


def inter(folder: Path, header: str | None, separator: str = "\t", encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [(u, i, 1 if n % 6 == 4 else 2 if n % 6 == 5 else 0) for n, (u, i) in enumerate(PAIRS)]
    lines = ([header] if header else []) + [separator.join(map(str, row)) for row in rows]
    (folder / "d.inter").write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return folder


HEADERS = ["userID\titemID\tx_label", "user_id:token\titem_id:token\tx_label:token", "\ufeffitemID\tuser\tlabel:float"]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_are_read(tmp_path: Path, header: str) -> None:
    assert len(load_interactions(inter(tmp_path / "d", header)).test) == 10


@pytest.mark.parametrize("separator", [",", ";", "|", " ", "::"])
@pytest.mark.parametrize("header", [True, False])
def test_another_separator_is_named_and_the_remedy_mends_it(tmp_path: Path, separator: str, header: bool) -> None:
    names = ["userID", "itemID", "x_label"]
    folder = inter(tmp_path / "d", separator.join(names) if header else None, separator)
    with pytest.raises(UserError, match=rf"separated by \w+.*--separator '{separator}'".replace("|'", "\\|'")):
        load_interactions(folder)
    prepare(folder / "d.inter", tmp_path / "new", separator=separator, columns=None if header else names)
    inter(tmp_path / "d", "\t".join(names))
    expected, found = load_interactions(folder), load_interactions(tmp_path / "new")
    assert sorted(found.test.tolist()) == sorted(expected.test.tolist())


def test_no_header_and_no_split_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="begins with numbers and has no header; put a line"):
        load_interactions(inter(tmp_path / "d", None))
    with pytest.raises(UserError, match=r"there is no x_label column among .*prepare FILE NEW` draw a split"):
        load_interactions(inter(tmp_path / "d", "user_id:token\titem_id:token\trating:float"))
    with pytest.raises(UserError, match="'userID' and 'user' may both hold the users"):
        load_interactions(inter(tmp_path / "d", "userID\tuser\tx_label"))
    with pytest.raises(UserError, match="the column 'x' stands there twice"):
        load_interactions(inter(tmp_path / "d", "userID\titemID\tx_label\tx\tx"))
    with pytest.raises(UserError, match=r"looks like UTF-16; .*--encoding utf-16"):
        load_interactions(inter(tmp_path / "d", HEADERS[0], encoding="utf-16"))
    done = prepare(tmp_path / "d" / "d.inter", tmp_path / "new", encoding="utf-16")
    assert (done.split, done.interactions) == ("kept", len(PAIRS))


# Files that are something else


def archive(write: object) -> bytes:
    stream = io.BytesIO()
    write(stream)  # type: ignore[operator]
    return stream.getvalue()


def tar(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as made:
        made.addfile(tarfile.TarInfo("x"), io.BytesIO())


def zipped(stream: io.BytesIO) -> None:
    with zipfile.ZipFile(stream, "w") as made:
        made.writestr("x", "y")


FOREIGN = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "gzip": gzip.compress(b"x"),
    "zip archive": archive(zipped),
    "NumPy archive": archive(lambda stream: np.savez(stream, a=np.ones((6, 2)))),
    "tar archive": archive(tar),
    "Parquet": b"PAR1" + bytes(20),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "pickle": pickle.dumps({1: 2}),
    "PDF": b"%PDF-1.7\n",
    "web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "PNG image": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, what: str) -> None:
    folder = inter(tmp_path / "d", HEADERS[0])
    (folder / "image_feat.npy").write_bytes(FOREIGN[what])
    with pytest.raises(UserError, match=rf"image_feat\.npy.*{what}") as caught:
        load_interactions(folder)
    assert "allow_pickle" not in str(caught.value)
    for name, read in (("d.inter", load_interactions), ("r.csv", lambda file: prepare(file, tmp_path / "out"))):
        (folder / name).write_bytes(FOREIGN[what])
        with pytest.raises(UserError, match=rf"{name} is .*{what}"):
            read(folder / name)


def test_long_values_are_cut(tmp_path: Path) -> None:
    for value in ("7" * 200_000, "x" * 200_000, "1e400", "-" + "9" * 5000):
        file = inter(tmp_path / "d", HEADERS[0]) / "d.inter"
        file.write_text(file.read_text() + f"0\t{value}\t0\n", encoding="utf-8")
        with pytest.raises(UserError, match="line 62") as caught:
            load_interactions(tmp_path / "d")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["3.0", "+3", " 3", "3 ", "3e0", "03", "3."])
def test_whole_numbers_in_other_spellings_are_read(tmp_path: Path, value: str) -> None:
    file = inter(tmp_path / "d", HEADERS[0]) / "d.inter"
    file.write_text(file.read_text() + f"0\t{value}\t0\n", encoding="utf-8")
    assert load_interactions(tmp_path / "d").train[-1].tolist() == [0, 3]


@pytest.mark.parametrize(
    "value", ["3.0000000000000001", "3.5", "1_0", "0x3", "nan", "True", "", "\u0663", "3\u200b", '"3"']
)
def test_what_is_no_whole_number_is_refused(tmp_path: Path, value: str) -> None:
    file = inter(tmp_path / "d", HEADERS[0]) / "d.inter"
    file.write_text(file.read_text() + f"0\t{value}\t0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 62: itemID is .*, not a whole number; correct the row"):
        load_interactions(tmp_path / "d")


TEXT = "user,item\n" + "".join(f"u{u},i{(u + k) % 9}\n" for u in range(12) for k in range(6))


@pytest.mark.parametrize(("written", "given"), [("utf-16", "utf-16-le"), ("utf-32", "utf-32"), ("utf-8-sig", "utf8")])
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path, written: str, given: str) -> None:
    (tmp_path / "raw.csv").write_bytes(TEXT.encode(written))
    assert prepare(tmp_path / "raw.csv", tmp_path / "new", encoding=given).users == 12


@pytest.mark.parametrize(
    ("written", "given", "told"),
    [("utf-32", "utf-8", "--encoding utf-32"), ("utf-16", "utf-8", "utf-16"), ("utf-8-sig", "latin-1", "utf-8")],
)
def test_a_byte_order_mark_names_the_encoding(tmp_path: Path, written: str, given: str, told: str) -> None:
    (tmp_path / "raw.csv").write_bytes(TEXT.encode(written))
    with pytest.raises(UserError, match=told):
        prepare(tmp_path / "raw.csv", tmp_path / "new", encoding=given)


@pytest.mark.parametrize(
    ("content", "told"),
    [(TEXT.encode(), "rename it without .gz"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_what_only_seems_compressed_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "raw.csv.gz").write_bytes(content)
    with pytest.raises(UserError, match=told):
        prepare(tmp_path / "raw.csv.gz", tmp_path / "new")


def test_columns_given_by_hand_do_not_turn_a_header_into_data(tmp_path: Path) -> None:
    rows = [f"u{u},i{(u + k) % 9},{k}" for u in range(12) for k in range(6)]
    (tmp_path / "raw.csv").write_text("\n".join(["who,what,n", *rows]) + "\n")
    with pytest.raises(UserError, match=r"--header .* --no-header"):
        prepare(tmp_path / "raw.csv", tmp_path / "new", columns=["user", "item", "-"])
    assert prepare(tmp_path / "raw.csv", tmp_path / "new", columns=["user", "item", "-"], header=True).rows_read == 72
    with pytest.raises(UserError, match="'ratng', which is not known"):
        prepare(tmp_path / "raw.csv", tmp_path / "other", columns=["user", "item", "ratng"], header=True)


def test_python_dictionaries_are_told_from_json(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text("{'reviewerID': 'a', 'asin': 'b'}\n")
    with pytest.raises(UserError, match="Python dictionary"):
        prepare(tmp_path / "raw.json", tmp_path / "new")


def test_a_feature_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    golden = Path(__file__).parent.parent / "golden" / "tiny"
    prepare(golden, tmp_path / "new")
    (tmp_path / "source").mkdir()
    for file in golden.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "source" / "text_feat.npy").unlink()
    (tmp_path / "source" / "text_feat.npy").symlink_to(tmp_path / "new" / "text_feat.npy")
    with pytest.raises(UserError, match="is read and would be replaced"):
        prepare(tmp_path / "source", tmp_path / "new", overwrite=True)
