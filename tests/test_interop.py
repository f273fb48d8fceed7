"""Published checkpoints: what fits is loaded, what does not is named, from a dict or a file."""

from __future__ import annotations

import builtins
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden import created, recorded_parameters

from mgrad_jax import interop, models
from mgrad_jax.data import demo_interactions
from mgrad_jax.errors import UserError

DATA = demo_interactions(n_users=40, n_items=30, n_groups=2)


def vbpr(seed: int = 1, **hyper_parameters: Any) -> models.Recommender:
    return models.create("vbpr", DATA, seed=seed, embedding_dim=4, **hyper_parameters)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_names_and_layout_are_the_published_ones() -> None:
    state = interop.torch_state(vbpr())
    width = sum(table.shape[1] for table in DATA.features.values())
    assert {name: array.shape for name, array in state.items()} == {
        "u_embedding": (40, 8),
        "i_embedding": (30, 4),
        "item_linear.weight": (4, width),
        "item_linear.bias": (4,),
    }


def test_a_state_goes_from_one_model_to_another_and_scores_follow() -> None:
    source, target = vbpr(1), vbpr(2)
    assert not same(interop.torch_state(source), interop.torch_state(target))
    assert interop.load_torch_state(target, interop.torch_state(source)) is target
    assert same(interop.torch_state(source), interop.torch_state(target))
    users = np.arange(5)
    np.testing.assert_array_equal(source.scores(users), target.scores(users))


@pytest.mark.parametrize("name", [name for name in models.names() if name != "lightgcn"])
def test_recorded_published_states_go_in_and_come_out(name: str) -> None:
    state = recorded_parameters("selfcfed_lgn" if name == "selfcf" else name)
    sizes = {"dualgnn": {"embedding_dim": 64}, "dragon": {"embedding_dim": 64}, "grcn": {"latent_embedding": 8}}
    model = created(name, **({"embedding_dim": 8} | sizes.get(name, {})))
    given = interop.torch_state(interop.load_torch_state(model, state))
    assert same(given, {published: state[published] for published in given})
    assert set(state) - set(given) <= set(model.ignored_names)


def test_an_npz_file_is_read(tmp_path: Path) -> None:
    source, target = vbpr(1), vbpr(2)
    np.savez(tmp_path / "vbpr.npz", **interop.torch_state(source))
    interop.load_torch_state(target, tmp_path / "vbpr.npz")
    assert same(interop.torch_state(source), interop.torch_state(target))


class Tensor:
    """What `load_torch_state` needs of a PyTorch tensor on a device."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


def test_tensors_are_taken_to_the_host() -> None:
    source, target = vbpr(1), vbpr(2)
    interop.load_torch_state(target, {name: Tensor(x) for name, x in interop.torch_state(source).items()})
    assert same(interop.torch_state(source), interop.torch_state(target))


class OddTensor(Tensor):
    """A PyTorch tensor that `numpy()` refuses until it is dense, dequantised or of a type that NumPy knows."""

    def __init__(self, array: np.ndarray, kind: str) -> None:
        super().__init__(array)
        self.kind = kind
        self.is_quantized = kind == "quantized"
        self.layout = "torch.sparse_coo" if kind == "sparse" else "torch.strided"

    def dequantize(self) -> Tensor:
        return Tensor(self.array)

    to_dense = dequantize

    def float(self) -> Tensor:
        return Tensor(self.array)

    def numpy(self) -> np.ndarray:
        raise TypeError(f"Got unsupported ScalarType {self.kind}")


@pytest.mark.parametrize("kind", ["BFloat16", "quantized", "sparse"])
def test_tensors_that_numpy_does_not_know_are_read(kind: str) -> None:
    source, target = vbpr(1), vbpr(2)
    interop.load_torch_state(target, {name: OddTensor(x, kind) for name, x in interop.torch_state(source).items()})
    assert same(interop.torch_state(source), interop.torch_state(target))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "uint8"])
def test_any_real_type_is_read(dtype: str) -> None:
    target = vbpr(2)
    state = {
        name: np.ones(x.shape).astype(np.dtype(jnp.dtype(dtype))) for name, x in interop.torch_state(target).items()
    }
    interop.load_torch_state(target, state)
    for array in interop.torch_state(target).values():
        assert array.dtype == np.float32
        assert (array == 1).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x.astype(complex), "u_embedding of the checkpoint has values of type complex128"),
        (lambda x: x.astype(bool), "u_embedding of the checkpoint has values of type bool"),
        (lambda x: x.astype(str), "u_embedding of the checkpoint has values of type <U32"),
        (lambda x: x.astype(np.float16).view("V2"), "u_embedding of the checkpoint has values of type |V2"),
        (lambda x: x * np.nan, "u_embedding of the checkpoint has values that are NaN, infinite"),
        (lambda x: np.full(x.shape, 1e300), "values that are NaN, infinite or too large for float32"),
        (lambda x: OddTensor(x, "meta"), "u_embedding of the checkpoint cannot be read"),
    ],
    ids=["complex", "bool", "text", "raw bytes", "NaN", "too large", "no values"],
)
def test_values_that_are_no_parameters_are_refused_by_name_and_nothing_changes(change: Any, sentence: str) -> None:
    model = vbpr()
    before = interop.torch_state(model)
    tensor = change(before["u_embedding"])
    if isinstance(tensor, OddTensor):
        tensor.float = tensor.numpy  # type: ignore[assignment]
    with pytest.raises(UserError, match=re.escape(sentence)):
        interop.load_torch_state(model, {**before, "u_embedding": tensor})
    assert same(before, interop.torch_state(model))


def test_what_a_file_holds_is_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    model, file = vbpr(), tmp_path / "state.npz"
    state = interop.torch_state(model)
    for change in ({"u_embedding": state["u_embedding"] * np.nan}, {"u_embedding": np.zeros(3, np.float32)}):
        np.savez(file, **{**state, **change})
        with pytest.raises(UserError, match=re.escape(str(file))):
            interop.load_torch_state(model, file)


@pytest.mark.parametrize("place", ["state_dict", "model_state_dict", "model"])
def test_the_state_is_found_beside_what_a_trainer_keeps(place: str) -> None:
    source, target = vbpr(1), vbpr(2)
    state = {f"module.{name}": Tensor(x) for name, x in interop.torch_state(source).items()}
    beside = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "_metadata": {"": {"version": 1}}}
    interop.load_torch_state(target, {**beside, place: {**state, "_metadata": {}}})
    assert same(interop.torch_state(source), interop.torch_state(target))


def test_what_holds_no_state_is_a_sentence() -> None:
    content: Any
    for content in ([1, 2], None, np.ones(3)):
        with pytest.raises(UserError, match="and no state_dict; save the state_dict alone"):
            interop.load_torch_state(vbpr(), content)
    with pytest.raises(UserError, match=r"does not fit vbpr \(missing: i_embedding, .* and 1 more"):
        interop.load_torch_state(vbpr(), {})
    many = {**interop.torch_state(vbpr()), **{f"layer.{i}" * 20: np.ones(1) for i in range(500)}}
    with pytest.raises(UserError, match="and 497 more") as caught:
        interop.load_torch_state(vbpr(), many)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "error", [pickle.UnpicklingError("Weights only load failed. In PyTorch 2.6, ..."), IndexError()]
)
def test_what_torch_refuses_is_a_sentence_without_its_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(file: Path, **options: Any) -> Any:
        assert options["weights_only"]
        raise error

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    with pytest.raises(UserError, match=r"save the state_dict alone|cannot be read as a checkpoint") as caught:
        interop.load_torch_state(vbpr(), tmp_path / "vbpr.pth")
    assert "Weights only" not in str(caught.value)


def test_all_misfits_are_listed_in_one_sentence_and_nothing_changes() -> None:
    model = vbpr()
    before = interop.torch_state(model)
    state = {**before, "item_bias": np.zeros(30), "i_embedding": np.zeros((31, 4)), "visual": np.zeros(2)}
    del state["u_embedding"], state["item_linear.bias"]
    expected = (
        "the checkpoint does not fit vbpr (missing: item_linear.bias, u_embedding; unexpected: item_bias, visual; "
        "misshaped: i_embedding has shape (31, 4) instead of (30, 4)); load the matching one."
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        interop.load_torch_state(model, state)
    assert same(before, interop.torch_state(model))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("absent.npz", None, "absent.npz cannot be read as a checkpoint"),
        ("text.npz", b"no archive", "text.npz cannot be read as a checkpoint"),
        ("cut.npz", b"PK\x03\x04", "cut.npz cannot be read as a checkpoint"),
        ("weights.bin", b"", "weights.bin ends in '.bin'; give a .npz, .pth or .pt file."),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(sentence)):
        interop.load_torch_state(vbpr(), tmp_path / name)


def test_a_pth_file_without_torch_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_torch(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match=r"needs PyTorch to be read; install torch, or save the arrays as \.npz"):
        interop.load_torch_state(vbpr(), tmp_path / "vbpr.pth")
