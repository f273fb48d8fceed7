"""The parameters of every N-th epoch of a run, kept for the analyses: `kept/<epoch>.npz`, one file per epoch.

A file is written before its epoch's checkpoint, so that a run which is killed and resumed has the same files, to the
byte, as an unbroken one. Nothing removes them.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mgrad_jax.errors import UserError, shown
from mgrad_jax.files import remove_leftovers, unreadable, written_whole
from mgrad_jax.models import Recommender, Variables
from mgrad_jax.processes import by_first, on_host
from mgrad_jax.training.config import RunConfig

_NAME = re.compile(r"(\d{6,})\.npz")
# Beside the parameters, whose names all begin otherwise.
_RUN, _PARAMS = "run", "params."


class KeptParams:
    """The kept parameters of one run.

    Args:
        directory: the run's.
        every: the parameters of one epoch in how many are kept; None: of none.
        run: the run's digest (`mgrad_jax.training.identity.identity`), so that its files tell whose they are.
    """

    def __init__(self, directory: Path, every: int | None, run: str) -> None:
        self.directory, self._every, self._run = directory / "kept", every, run

    def save(self, epoch: int, params: Variables) -> None:
        """Keep the parameters after an epoch if it is one of those; the file has reached the disk when this returns.

        Raises:
            UserError: it cannot be written.
        """
        if self._every is None or epoch % self._every:
            return
        arrays = {_PARAMS + name: on_host(variable.get_value()) for name, variable in named(params).items()}
        by_first(lambda: self._write(epoch, arrays))

    def _write(self, epoch: int, arrays: dict[str, np.ndarray]) -> None:
        remove_leftovers(self.directory)
        with written_whole(self.directory / f"{epoch:06d}.npz", "wb") as stream:
            np.savez(stream, **{_RUN: np.asarray(self._run)}, **arrays)  # type: ignore[arg-type]

    def epochs(self) -> list[int]:
        """The epochs whose parameters are there, ascending."""
        try:
            names = [_NAME.fullmatch(path.name) for path in self.directory.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise unreadable(self.directory, error) from None
        return sorted(int(match[1]) for match in names if match)

    def load(self, epoch: int, model: Recommender) -> None:
        """Give the model, created as in the run, the parameters of an epoch.

        Raises:
            UserError: they are not there, damaged, or of another run.
        """
        path = self.directory / f"{epoch:06d}.npz"
        saved = _read(path)
        if str(saved.pop(_RUN, None)) != self._run:
            raise UserError(f"{path} belongs to another run than {self.directory.parent}; move {self.directory} away.")
        params = nnx.state(model, nnx.Param)
        for name, variable in named(params).items():
            value, array = variable.get_value(), saved.pop(_PARAMS + name, None)
            if array is not None and array.dtype.kind == "V":  # numpy's format does not know bfloat16 by name
                array = array.view(value.dtype)
            if array is None or (array.shape, array.dtype) != (value.shape, value.dtype):
                raise UserError(f"{path} holds no {shown(name)} as the run's model has it; move the file away.")
            variable.set_value(array)
        nnx.update(model, params)

    def least_bytes(self, config: RunConfig, params: Variables, epoch: int, best_epoch: int) -> int:
        """What the epochs will take that are certain to come: those until the patience ends without improvement.

        Of the parameters shapes suffice.
        """
        if self._every is None:
            return 0
        last = min(config.epochs, max(best_epoch, 1) + config.patience + 1)
        values = [variable.get_value() for variable in named(params).values()]
        size = sum(value.size * value.dtype.itemsize for value in values)
        return int(size * max(0, last // self._every - epoch // self._every))


def named(params: Variables) -> dict[str, nnx.Variable[Any]]:
    """Variables by dotted path."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; every byte is checked against its checksum.

    Raises:
        UserError: it is not there, damaged, or cannot be read now.
    """
    try:
        # Opened here: numpy leaves a file that it cannot decode open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; keep parameters with `mgrad-jax train --keep-every N`.") from None
    except (ValueError, EOFError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is damaged; delete it, or restore it from a copy of yours.") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None
