"""A declared setting is an option, a default, a help text and a check, with nothing else said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mgrad_jax.cli.options import Part, takes_settings
from mgrad_jax.declaration import check, check_all, marked, plain, setting, spelling
from mgrad_jax.errors import UserError


@dataclass(frozen=True)
class Asked:
    warmth: float = setting(0.5, "How warm.", above=0, most=9, tested=True)
    rounds: int = setting(3, "How often.", least=1, limit=100, option=("--times",))
    colour: str = setting("red", "Which.", choices=("red", "green"))
    shares: tuple[float, ...] = setting((0.0, 0.25), "Of what.", least=0, most=1, metavar="S,...")
    limit: float | None = setting(None, "At most.", kind=float, above=0)
    loud: bool = setting(False, "Whether it is heard.")
    table: Mapping[str, Any] = setting({}, "An argument.", option=("--arg", "--argument"))
    hidden: int = setting(7, option=())

    def __post_init__(self) -> None:
        check_all(self, as_options=True)


def run(*words: str) -> tuple[Any, str]:
    """What a command is given for these words, and its help or the error it raised."""
    found: list[Any] = []
    app = typer.Typer()

    @app.command()
    @takes_settings(asked=Asked)
    def command(*, other: int = 1, asked: Asked) -> None:
        found.append((other, asked))

    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    return (found[0] if found else None), result.output if result.exception is None else repr(result.exception)


def test_options_give_an_instance_and_leave_defaults_alone() -> None:
    assert run()[0] == (1, Asked())
    words = ("--warmth", "2", "--times", "5", "--colour", "green", "--shares", "0,1", "--limit", "4", "--loud")
    assert run(*words, "--arg", "a=1", "--argument", "b=x", "--other", "2")[0] == (
        2,
        Asked(2.0, 5, "green", (0.0, 1.0), 4.0, True, {"a": 1, "b": "x"}),
    )


def test_help_says_what_was_declared() -> None:
    shown = " ".join(run("--help")[1].split())
    for text in ("How warm. [default: 0.5]", "How often.", "S,...", "[default: 0,0.25]", "KEY=VALUE", "--argument"):
        assert text in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--warmth", "0"), "--warmth is 0.0; it must be above 0 and at most 9."),
        (("--times", "101"), "--times is 101; it must be at most 100."),
        (("--colour", "gren"), "--colour is 'gren'; choose one of red, green (did you mean green?)."),
        (("--shares", "0,2"), "--shares is 2.0; it must be between 0 and 1."),
        (("--shares", "much"), "--shares much is no list of numbers"),
        (("--limit", "-1"), "--limit is -1.0; it must be a positive number."),
        (("--arg", "a"), "--arg a is not of the form key=value"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_option(words: tuple[str, ...], sentence: str) -> None:
    assert sentence in run(*words)[1]


def test_a_part_of_the_settings_is_given_by_name() -> None:
    app, found = typer.Typer(), []

    @app.command()
    @takes_settings(some=Part(Asked, ("warmth", "limit")))
    def command(some: dict[str, Any]) -> None:
        found.append(some)

    assert CliRunner().invoke(app, ["--warmth", "3"]).exit_code == 0
    assert found == [{"warmth": 3.0, "limit": None}]
    assert CliRunner().invoke(app, ["--loud"]).exit_code == 2


def test_marks_and_spellings_are_read_from_the_declaration() -> None:
    assert marked(Asked, "tested") == ("warmth",)
    assert [spelling(field) for field in fields(Asked)][-2:] == ["--arg", ""]


@pytest.mark.parametrize("value", [np.int64(4), np.int32(4), 4])
def test_numbers_of_numpy_are_numbers_and_become_pythons_in_files(value: Any) -> None:
    assert plain({"rounds": Asked(rounds=value).rounds, "x": (np.float32(0.5),)}) == {"rounds": 4, "x": [0.5]}
    assert type(plain(np.int64(4))) is int


@pytest.mark.parametrize("value", [True, "3", 3.0, None, float("nan")])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"rounds is .*; it must be a whole number"):
        check(fields(Asked)[1], value)
