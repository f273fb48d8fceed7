"""Early stopping: which epoch is the best so far, and when to stop waiting for a better one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class EarlyStopping:
    """A strictly greater value of the metric is an improvement.

    Attributes:
        epoch, best_epoch, bad_epochs: epochs so far, the best of them, and epochs since without improvement.
        best_value: the selection metric at the best epoch.
        valid, test: all metrics at the best epoch.
    """

    epoch: int = 0
    best_epoch: int = 0
    bad_epochs: int = 0
    best_value: float = -1.0
    valid: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)

    def update(self, metric: str, valid: dict[str, float], test: dict[str, float]) -> bool:
        """Count one more epoch with these metrics; returns whether it is the best so far."""
        self.epoch += 1
        if valid[metric] > self.best_value:
            self.best_epoch, self.bad_epochs, self.best_value = self.epoch, 0, valid[metric]
            self.valid, self.test = valid, test
            return True
        self.bad_epochs += 1
        return False

    def is_over(self, epochs: int, patience: int) -> bool:
        """Whether the last epoch is reached, or more than `patience` in a row brought no improvement."""
        return self.epoch >= epochs or self.bad_epochs > patience

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The same as arrays of fixed shapes, for a checkpoint; metrics in the order of their names."""
        names = sorted(self.valid)
        return {
            "counters": np.asarray([self.epoch, self.best_epoch, self.bad_epochs], np.int64),
            "best_value": np.asarray(self.best_value, np.float64),
            "valid": np.asarray([self.valid[name] for name in names], np.float64),
            "test": np.asarray([self.test[name] for name in names], np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], names: Sequence[str]) -> EarlyStopping:
        """The inverse of `to_arrays` for metrics of these names."""
        epoch, best_epoch, bad_epochs = (int(n) for n in arrays["counters"])
        valid, test = (dict(zip(sorted(names), map(float, arrays[split]), strict=True)) for split in ("valid", "test"))
        return cls(epoch, best_epoch, bad_epochs, float(arrays["best_value"]), valid, test)
