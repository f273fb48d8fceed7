"""Hyper-parameters are declared with their ranges, and a configuration takes nothing outside of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mgrad_jax import models
from mgrad_jax.errors import UserError
from mgrad_jax.models.base import ModelConfig
from mgrad_jax.models.hyper_parameters import Range, hyper

FIELDS = {
    f"{name} {field.name}": (name, field)
    for name in models.names()
    for field in dataclasses.fields(models.model_class(name).config_class)
}
WORDS = {bool: "true or false", int: "a whole number", float: "a (positive )?number"}
NUMBERS = {key: pair for key, pair in FIELDS.items() if not isinstance(pair[1].default, bool)}


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_lower_bound_and_nothing_below_it_is_taken(key: str) -> None:
    name, field = NUMBERS[key]
    numbers: Range = field.metadata["range"]
    assert field.default in numbers
    outside = numbers.above if numbers.least is None else numbers.least - 1
    assert outside is not None
    with pytest.raises(UserError, match=f"^{field.name} is {outside}; it must (be|not be) [a-z0-9 ]+\\.$"):
        models.make_config(name, {field.name: outside})


@pytest.mark.parametrize("key", [key for key, (_, field) in NUMBERS.items() if "layer" in field.name])
def test_more_layers_than_a_program_can_have_are_refused(key: str) -> None:
    name, field = NUMBERS[key]
    assert getattr(models.make_config(name, {field.name: 100}), field.name) == 100
    with pytest.raises(UserError, match="is 101; it must be at most 100"):
        models.make_config(name, {field.name: 101})


@pytest.mark.parametrize("key", FIELDS)
def test_a_value_of_another_type_is_refused(key: str) -> None:
    name, field = FIELDS[key]
    kind = type(field.default)
    wrong: list[Any] = [None, [field.default], *([0, "yes"] if kind is bool else [True, "1", float("nan")])]
    for value in wrong if kind is not int else [*wrong, 1.0]:
        with pytest.raises(UserError, match=f"^{field.name} is .*; it must be {WORDS[kind]}"):
            models.make_config(name, {field.name: value})


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    share: float = hyper(0.5, "a share", least=0, below=1)
    part: float = hyper(0.5, "a part", above=0, most=1)
    place: int = hyper(3, "a place", least=1, most=5)
    rate: float = hyper(1.0, "a rate", above=0)
    free: float = hyper(0.0, "any number")


@pytest.mark.parametrize(
    ("name", "inside", "outside", "words"),
    [
        ("share", [0, 0.999], [-1e-9, 1, 1.5], "be at least 0 and below 1"),
        ("part", [1e-9, 1], [0, 1.001], "be above 0 and at most 1"),
        ("place", [1, 5], [0, 6], "be between 1 and 5"),
        ("rate", [1e-30, 1e30], [0, -0.0, -1], "be a positive number"),
        ("free", [-1e38, 1e38], [1e39, float("-inf")], "be at most 3.4e+38"),
        ("embedding_dim", [1], [0, -5], "be at least 1"),
    ],
)
def test_bounds_belong_to_a_range_or_do_not(name: str, inside: list[Any], outside: list[Any], words: str) -> None:
    for value in inside:
        assert getattr(Config(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(UserError) as caught:
            Config(**{name: value})
        assert str(caught.value) == f"{name} is {value!r}; it must {words}."


def test_a_range_is_shown_as_tables_need_it() -> None:
    shown = {field.name: str(field.metadata["range"]) for field in dataclasses.fields(Config)}
    assert shown == {
        "embedding_dim": ">= 1",
        "share": ">= 0, < 1",
        "part": "> 0, <= 1",
        "place": ">= 1, <= 5",
        "rate": "> 0",
        "free": "",
    }


@pytest.mark.parametrize("key", [key for key, (_, field) in FIELDS.items() if field.metadata.get("traced")])
def test_what_is_traced_is_a_float(key: str) -> None:
    """Whole numbers decide shapes and numbers of layers, which no program can have as an argument."""
    assert isinstance(FIELDS[key][1].default, float)
