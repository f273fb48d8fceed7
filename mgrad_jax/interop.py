"""Parameters of published PyTorch checkpoints, in and out, by the names the published code gives them."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mgrad_jax.errors import UserError
from mgrad_jax.models import Recommender

# What NumPy and PyTorch raise over a file that is damaged or of another kind.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, KeyError, struct.error, pickle.UnpicklingError)


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
            installed (a state_dict, or a dict that holds one under "state_dict").

    Returns:
        The same model.

    Raises:
        UserError: names that are missing, unexpected or of another shape, all in one sentence; a file that cannot be read.
            The model is unchanged then.
    """
    arrays = _read(Path(state)) if isinstance(state, str | Path) else state
    parameters = list(_named_parameters(model))
    ignored = set(model.ignored_names)
    expected = {name: _transposed(path, np.asarray(variable[...])).shape for path, name, variable in parameters}
    given = {name: np.asarray(_host(array)) for name, array in arrays.items() if name not in ignored}
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshaped = [
        f"{name} has shape {given[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in given and given[name].shape != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    complaints = [f"{kind}: {', '.join(names)}" for kind, names in found.items() if names]
    if complaints:
        raise UserError(f"the checkpoint does not fit {model.name} ({'; '.join(complaints)}); load the matching one.")
    for path, name, variable in parameters:
        variable[...] = jnp.asarray(_transposed(path, given[name]), variable[...].dtype)
    return model


def _named_parameters(model: Recommender) -> list[tuple[str, str, nnx.Variable[Any]]]:
    """Our path, the published name and the variable of every parameter the model has."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    paths = [(".".join(map(str, path)), variable) for path, variable in flat]
    return [(path, model.published_names[path], variable) for path, variable in paths]


def _transposed(path: str, array: np.ndarray) -> np.ndarray:
    """Kernels are (in, out) here and (out, in) there; the change is its own inverse."""
    return array.T if path.rpartition(".")[2] == "kernel" else array


def _host(array: Any) -> Any:
    """A PyTorch tensor on the host; anything else as it is."""
    return array.detach().cpu().numpy() if hasattr(array, "detach") else array


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if file.suffix in (".pth", ".pt"):
            return _read_torch(file)
    except _UNREADABLE as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{file} cannot be read as a checkpoint ({reason}); check the path and the file.") from None
    raise UserError(f"{file} ends in '{file.suffix}'; give a .npz, .pth or .pt file.")


def _read_torch(file: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(f"{file} needs PyTorch to be read; install torch, or save the arrays as .npz.") from None
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)
