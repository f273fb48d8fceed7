"""What is refused before anything is loaded: words given twice, empty ones, numbers beyond their range or sense."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_lines import assert_one_sentence
from rich.console import Console

from mgrad_jax.cli import console, main
from mgrad_jax.cli.options import scalar
from mgrad_jax.cli.runs import read_users
from mgrad_jax.cli.sweep import read_grid
from mgrad_jax.errors import UserError, did_you_mean
from mgrad_jax.models import make_config
from mgrad_jax.optimizers import make_optimizer
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.sweep_run import SweepConfig

# --- words ------------------------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[list[str], str]] = {
    "twice": (["--epochs", "1", "--epochs", "2"], "--epochs is given twice; leave one of them out"),
    "twice, once with =": (["--epochs=1", "--epochs", "2"], "--epochs is given twice"),
    "twice the same": (["--model", "bm3", "--model", "bm3"], "--model is given twice"),
    "a flag twice": (["--resume", "--resume"], "--resume is given twice"),
    "both of a pair": (["--mirror", "--no-mirror"], "--mirror and --no-mirror exclude each other"),
    "two values twice": (["--learning-rate-decay", "1", "9", "--learning-rate-decay", "1", "8"], "given twice"),
    "a key twice": (["--set", "reg_weight=1", "--set", "reg_weight = 2"], "--set reg_weight is given twice"),
    "an argument twice": (["--optimizer-arg", "b1=1", "--optimizer-arg", "b1=2"], "--optimizer-arg b1 is given twice"),
    "a part twice": (["--adversarial", "epsilon=1,epsilon=2"], "--adversarial epsilon is given twice"),
    "empty": (["--out", ""], "--out is empty; give it a value or leave it out"),
    "empty after =": (["--out="], "--out is empty"),
    "blank": (["--out", " "], "--out is blank; give it a value or leave it out"),
    "empty argument": ([""], "an argument is empty"),
    "empty value of a key": (["--set", "reg_weight="], "is not of the form key=value"),
    "underscores": (["--epochs", "1_000"], "--epochs '1_000' is not a number in plain digits"),
    "other digits": (["--alpha1", "٣"], "--alpha1 '٣' is not a number in plain digits"),
    "other digits in a pair": (["--learning-rate-decay", "1", "٣"], "is not a number in plain digits"),
    "underscores in a key": (["--set", "embedding_dim=1_0"], "embedding_dim is '1_0'; it must be a whole number"),
    "nesting": (["--set", "reg_weight=" + "[" * 20_000], "[[[...'; it must be a number"),
    "near option": (["--epoch", "1"], "(did you mean --epochs?)"),
    "near model": (["--model", "LightGNC"], "(did you mean lightgcn?)"),
    "near hyper-parameter": (["--set", "reg_wieght=1"], "(did you mean reg_weight?)"),
    "near metric": (["--metric", "recal@5"], "(did you mean recall@5?)"),
    "near optimizer": (["--optimizer", "adagard"], "(did you mean adagrad?)"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_are_checked_before_anything_is_done(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, part = WORDS[case]
    for option, value in (("--model", "vbpr"), ("--data", "demo")):
        if option not in words:
            words = [*words, option, value]
    assert_one_sentence(main(["train", *words]), capfd.readouterr(), part)
    assert not list(tmp_path.iterdir())


def test_the_words_of_other_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_sentence(main(["trian"]), capfd.readouterr(), "(did you mean train?)")
    assert_one_sentence(main(["info", ""]), capfd.readouterr(), "an argument is empty")
    twice = ["recommend", "run", "--top-k", "1", "--top-k", "2"]
    assert_one_sentence(main(twice), capfd.readouterr(), "--top-k is given twice")
    assert_one_sentence(main(["sweep", "--seeds", "1_0"]), capfd.readouterr(), "'1_0' is not a number in plain digits")
    with pytest.raises(UserError, match="published is given twice"):
        read_grid("freedom", ["published", "published"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("No", False),
        ("tRue", "tRue"),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("1_0", "1_0"),
        ("٣", "٣"),
        ("[1]", "[1]"),
        ("'", "'"),
    ],
)
def test_scalar(text: str, value: Any) -> None:
    found = scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_did_you_mean() -> None:
    assert did_you_mean("FREEDUM", ["bm3", "freedom"]) == " (did you mean freedom?)"
    assert did_you_mean("x", ["bm3", "freedom"]) == did_you_mean(None, []) == ""


# --- ranges -----------------------------------------------------------------------------------------------------------

RANGES: dict[str, tuple[dict[str, Any], str]] = {
    "interval": ({"interval": 2**31}, "interval is 2147483648; it must be at most 2147483647"),
    "batch size": ({"batch_size": 2**31}, "batch_size is 2147483648"),
    "epochs": ({"epochs": 10**30}, "it must be at most"),
    "patience": ({"patience": 2**31}, "it must be at most"),
    "truth value as number": ({"epochs": True}, "epochs is True; it must be a whole number"),
    "fraction": ({"patience": 2.0}, "patience is 2.0; it must be a whole number"),
    "seed": ({"seed": 2**32}, "seed is 4294967296; it must be at most 4294967295"),
    "text as weight decay": ({"weight_decay": "nan"}, "weight_decay is 'nan'"),
    "truth value as weight decay": ({"weight_decay": True}, "weight_decay is True"),
    "infinite weight decay": ({"weight_decay": float("inf")}, "weight_decay is inf"),
    "alpha beyond float32": ({"alpha1": 1e39}, "alpha1 is 1e+39; it must be a number from 1.2e-38 to 3.4e+38"),
    "alpha that is zero in float32": ({"alpha2": 1e-300}, "alpha2 is 1e-300"),
    "alpha beyond every float": ({"alpha1": 10**400}, "alpha1 is 1000"),
    "learning rate": ({"learning_rate": "0.1"}, "learning_rate is '0.1'; it must be a positive number"),
    "no cut-offs": ({"ks": ()}, "ks is empty"),
    "huge cut-off": ({"ks": (5, 2**31)}, "ks is 2147483648"),
    "decay that overflows a float": ({"epochs": 3, "learning_rate_decay": (10, 1e-3)}, "above 3.4e+38 by epoch 3"),
    "decay that overflows a float32": ({"epochs": 43, "learning_rate_decay": (10.0, 1.0)}, "above 3.4e+38 by epoch 43"),
    "decay of three numbers": ({"learning_rate_decay": (1.0, 2.0, 3.0)}, "it must be two numbers"),
    "decay of nan": ({"learning_rate_decay": (float("nan"), 1.0)}, "learning_rate_decay is nan"),
}


@pytest.mark.parametrize("case", RANGES)
def test_a_run_takes_no_number_out_of_range(case: str) -> None:
    values, part = RANGES[case]
    with pytest.raises(UserError) as caught:
        RunConfig("vbpr", "demo", **values)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_largest_numbers_are_taken() -> None:
    config = RunConfig("vbpr", "demo", interval=2**31 - 1, batch_size=2**31 - 1, seed=2**32 - 1, epochs=2**31 - 1)
    assert config.interval == 2**31 - 1
    assert RunConfig("vbpr", "demo", epochs=42, learning_rate_decay=(10.0, 1.0)).epochs == 42


@pytest.mark.parametrize(
    ("model", "values", "part"),
    [
        ("lightgcn", {"n_layers": 101}, "n_layers is 101; it must be at most 100"),
        ("slmrec", {"layer_num": 10**9}, "layer_num is 1000000000; it must be at most 100"),
        ("vbpr", {"embedding_dim": 10**12}, "it must be at most 4294967295"),
        ("vbpr", {"reg_weight": float("inf")}, "reg_weight is inf; it must be at most 3.4e+38"),
        ("vbpr", {"reg_weight": "7" * 5000}, "it must be a number"),
    ],
)
def test_hyper_parameters_have_ranges(model: str, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(model, values)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 300


def test_numbers_of_numpy_are_numbers() -> None:
    assert make_config("vbpr", {"reg_weight": np.float64(0.1)}).reg_weight == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("adam", {"b1": float("nan")}, "b1 of adam is nan; it must be finite"),
        ("adam", {"b1": True}, "b1 of adam is True; it must be a number"),
        ("sgd", {"nesterov": 3}, "nesterov of sgd is 3; it must be true or false"),
    ],
)
def test_arguments_of_optimizers_make_sense(name: str, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        make_optimizer(name, 0.1, **arguments)


@pytest.mark.parametrize(
    ("grid", "seeds", "part"),
    [
        ({}, 3_000_000, "has 3000000 members; it can have 10000"),
        ({}, 10**20, "members; it can have 10000"),
        ({}, True, "seeds is True"),
        ({"alpha1": range(1, 102), "alpha2": range(1, 102)}, 1, "has 10201 members"),
    ],
)
def test_a_sweep_is_counted_before_it_is_expanded(grid: dict[str, Any], seeds: int, part: str) -> None:
    with pytest.raises(UserError, match=part):
        SweepConfig(RunConfig("vbpr", "demo"), grid, seeds)


# --- a file of users --------------------------------------------------------------------------------------------------

NAMES = np.array(["U7", "3", "a b", "user"], dtype=object)


@pytest.mark.parametrize(
    ("content", "names", "users"),
    [
        (b"\xef\xbb\xbf3\n", None, [3]),
        (b"2\r\n\r\n0\r\n2\r\n", None, [2, 0]),
        (b"user_id\n007\n\n", None, None),
        (b"userID\n003", None, [3]),
        (b"U7\r\n a b \nU7\n", NAMES, [0, 2]),
        (b"3\n", NAMES, [1]),  # as a raw id, not as the user with this number
        (b"user\n3\n", NAMES, [3, 1]),  # a user of that name, no header
    ],
)
def test_users_file(content: bytes, names: Any, users: list[int] | None, tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_bytes(content)
    if users is None:
        with pytest.raises(UserError, match="line 2: '007' is not a user id from 0 to 3"):
            read_users(file, 4, names)
    else:
        assert read_users(file, 4, names).tolist() == users


@pytest.mark.parametrize(
    ("content", "names", "part"),
    [
        (b"9" * 5000, None, "line 1: '999"),
        ("٣\n".encode(), None, "line 1: '٣' is not a user id"),
        (b"1_0\n", None, "line 1"),
        (b"0 1\n", None, "line 1: '0 1'"),
        (b"\xff\xfe0\n", None, "cannot be read"),
        (b"U8\n", NAMES, "line 1: 'U8' is not a raw id of the dataset's user_map.tsv; correct"),
        (b"0\n", NAMES, "with --internal-ids it would be one"),
        (b"\n \n", None, "names no user"),
    ],
)
def test_bad_users_file(content: bytes, names: Any, part: str, tmp_path: Path) -> None:
    file = tmp_path / "users.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_users(file, 4, names)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 100 + len(str(file)) + 100


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have tables printed at a width; call the result for what was printed."""

    def at(width: int) -> io.StringIO:
        stream = io.StringIO()
        made = Console(file=stream, width=width, markup=False, emoji=False, highlight=False)
        monkeypatch.setattr(console, "console", lambda: made)
        return stream

    return at


@pytest.mark.parametrize("width", [160, 80, 36])
def test_metrics_are_readable_at_any_width(width: int, terminal: Any) -> None:
    names = [f"{name}@{k}" for name in ("recall", "precision", "map", "ndcg") for k in (5, 10)]
    valid = {name: i / 100 for i, name in enumerate(names)}
    test = {name: (i + 50) / 100 for i, name in enumerate(names)}
    stream = terminal(width)
    console.print_metrics("title", ["a note that is longer than thirty-six characters"], valid, test)
    text = stream.getvalue()
    for value in (*valid.values(), *test.values()):
        assert f"{value:.4f}" in text
    assert "a note that is longer than thirty-six characters\n" in text
    assert max(len(line) for line in text.splitlines() if "note" not in line) <= width


def test_a_table_too_wide_for_any_layout_is_a_list(terminal: Any) -> None:
    stream = terminal(12)
    console.print_table("t", ["first", "second\nheading"], [["1", "2"], ["3", "4"]])
    words = stream.getvalue().split()
    assert words == ["t", "first", "1", "second", "heading", "2", "first", "3", "second", "heading", "4"]


def test_brackets_are_no_markup(terminal: Any) -> None:
    stream = terminal(80)
    console.print_table("m[/x]", ["a[bold]"], [["[red]:smile:"]], ["r[bold]/x[/x]"])
    for text in ("m[/x]", "a[bold]", "[red]:smile:", "r[bold]/x[/x]"):
        assert text in stream.getvalue()


def test_an_ascii_terminal_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.print_table("t", ["a"], [[f"0.1 {console.plus_minus()} 0.2"]])
    console.sys.stdout.flush()
    assert b"0.1 +/- 0.2" in raw.getvalue()


def test_without_a_terminal_every_step_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with console.progress("title") as tell:
        tell("epoch 1", 1, 2)
        tell("epoch 2", 2, 2)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("epoch 1\nepoch 2\n", "")
