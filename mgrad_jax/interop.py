"""Parameters of published PyTorch checkpoints, in and out, by the names the published code gives them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgrad_jax.errors import UserError, shown
from mgrad_jax.models import Recommender

# Where trainers keep the state_dict beside an optimizer's, a number of epochs and the like.
_PLACES = ("state_dict", "model_state_dict", "model")
# What torch.nn.DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_SAVE_ALONE = "save the state_dict alone, torch.save(model.state_dict(), file), and give that file"


def torch_state(model: Recommender) -> dict[str, np.ndarray]:
    """The model's parameters under published names and in PyTorch's layout (kernels transposed).

    Args:
        model: any recommender of `mgrad_jax.models`.

    Returns:
        Arrays by published name; `torch.from_numpy` makes a state_dict of them.
    """
    return {name: _transposed(path, np.asarray(variable[...])) for path, name, variable in _named_parameters(model)}


def load_torch_state(model: Recommender, state: Mapping[str, Any] | str | Path) -> Recommender:
    """Give a model the parameters of the published implementation.

    Args:
        model: created with the sizes of the checkpoint; its parameters are replaced, in its own dtype.
        state: arrays (NumPy, JAX or PyTorch) by published name, or a file: `.npz`, or `.pth`/`.pt` where torch is
            installed. A dict that holds the arrays under "state_dict", "model_state_dict" or "model" does as well, and
            so do names that DataParallel has prefixed. Tensors may be of any real type, quantised or sparse.

    Returns:
        The same model.

    Raises:
        UserError: names that are missing, unexpected or of another shape, all in one sentence; values that are complex,
            not finite or no numbers; a file that cannot be read. The model is unchanged then.
    """
    parameters = list(_named_parameters(model))
    expected = {name: _transposed(path, np.asarray(variable[...])).shape for path, name, variable in parameters}
    file = state if isinstance(state, str | Path) else None
    source = "the checkpoint" if file is None else str(file)
    arrays = _state_dict(source, _read(Path(file)) if file is not None else state, expected)
    given = {name: _host(source, name, array) for name, array in arrays.items() if name not in model.ignored_names}
    _check_fit(source, model.name, expected, given)
    values = {
        name: _converted(source, name, _transposed(path, given[name]), variable[...].dtype)
        for path, name, variable in parameters
    }
    for _, name, variable in parameters:
        variable.set_value(jax.device_put(values[name]))  # `variable[...] =` would compile a program per shape
    return model


def _check_fit(
    source: str, model: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray]
) -> None:
    """Name everything that does not fit, in one sentence."""
    found = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "misshaped": [
            f"{name} has shape {given[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in given and given[name].shape != shape
        ],
    }
    complaints = [f"{kind}: {_listed(names)}" for kind, names in found.items() if names]
    if complaints:
        raise UserError(f"{source} does not fit {model} ({'; '.join(complaints)}); load the matching one.")


def _listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    names = [name if len(name) <= 80 else name[:77] + "..." for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _named_parameters(model: Recommender) -> list[tuple[str, str, nnx.Variable[Any]]]:
    """Our path, the published name and the variable of every parameter the model has."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    paths = [(".".join(map(str, path)), variable) for path, variable in flat]
    return [(path, model.published_names[path], variable) for path, variable in paths]


def _transposed(path: str, array: np.ndarray) -> np.ndarray:
    """Kernels are (in, out) here and (out, in) there; the change is its own inverse."""
    return array.T if path.rpartition(".")[2] == "kernel" else array


def _state_dict(source: str, state: Any, expected: Iterable[str]) -> dict[str, Any]:
    """The arrays by published name, wherever in a checkpoint they are; what is no array stays behind."""
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds a {type(state).__name__} and no state_dict; {_SAVE_ALONE}.")
    if not set(expected) & {str(name) for name in state}:
        nested = next((state[place] for place in _PLACES if isinstance(state.get(place), Mapping)), None)
        if nested is not None:
            return _state_dict(source, nested, expected)
    named = {str(name): value for name, value in state.items()}
    arrays = {name: value for name, value in named.items() if _is_array(value) or name in set(expected)}
    for prefix in _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _state_dict(source, {name.removeprefix(prefix): value for name, value in arrays.items()}, expected)
    return arrays


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or hasattr(value, "detach")


def _host(source: str, name: str, array: Any) -> np.ndarray:
    """A tensor as a NumPy array on the host; one that has no numbers is refused by name."""
    try:
        return np.asarray(_dense(array) if hasattr(array, "detach") else array)
    except Exception as error:  # frameworks raise whatever they like over what they cannot convert
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} of {source} cannot be read ({shown(reason)}); {_SAVE_ALONE}.") from None


def _dense(tensor: Any) -> Any:
    """A PyTorch tensor as NumPy has them: on the host, every value in its place, in a type that NumPy knows."""
    tensor = tensor.detach().cpu()
    if getattr(tensor, "is_quantized", False):
        tensor = tensor.dequantize()
    if not str(getattr(tensor, "layout", "strided")).endswith("strided"):
        tensor = tensor.to_dense()
    try:
        return tensor.numpy()
    except TypeError:  # bfloat16 and the types of 8 bits
        return tensor.float().numpy()


def _converted(source: str, name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """A parameter in the model's dtype; values that are no real numbers, or do not fit there, are refused by name."""
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise UserError(f"{name} of {source} has values of type {array.dtype}; save it as float32.")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    if not np.isfinite(converted).all():
        raise UserError(
            f"{name} of {source} has values that are NaN, infinite or too large for {converted.dtype}; load one "
            "of an earlier epoch."
        )
    return converted


def _read(file: Path) -> Any:
    suffix = file.suffix.lower()
    if suffix not in (".npz", ".pth", ".pt"):
        raise UserError(f"{file} ends in '{file.suffix}'; give a .npz, .pth or .pt file.")
    try:
        return _read_npz(file) if suffix == ".npz" else _read_torch(file)
    except UserError:
        raise
    except pickle.UnpicklingError:
        # PyTorch's own words advise to load whatever the file holds, code included.
        raise UserError(f"{file} is damaged, or holds other objects than tensors; {_SAVE_ALONE}.") from None
    except Exception as error:  # readers of foreign formats raise whatever they trip over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} cannot be read as a checkpoint ({reason[:200]}); check the path and the file."
        ) from None


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    with file.open("rb") as stream:
        if stream.read(2) != b"PK":
            raise ValueError("it is no archive of arrays")
        stream.seek(0)
        try:
            with np.load(stream, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise ValueError("it holds Python objects beside arrays") from None


def _read_torch(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} needs PyTorch to be read; install torch, or save the arrays as .npz.") from None
    return torch.load(file, map_location="cpu", weights_only=True)
