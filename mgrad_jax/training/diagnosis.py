"""Why a training diverged, as far as it shows, and what there is to go on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgrad_jax.data import Interactions
from mgrad_jax.models import Recommender
from mgrad_jax.models.adversarial import AdversarialRecommender

# Features of pretrained networks, normalised or not, stay far below.
_HUGE = 1e4


@dataclass
class Diagnosis:
    """What divergence can come from in one training.

    Attributes:
        features: the features that the model reads.
        adversarial: whether the loss is that on perturbed features, too.
        checkpoints: where they are kept, None where none are.
    """

    features: dict[str, np.ndarray]
    adversarial: bool
    checkpoints: Path | None = None

    @classmethod
    def of(cls, model: Recommender, data: Interactions) -> Diagnosis:
        """For a model and its data."""
        features = {name: data.features[name] for name in model.needs if name in data.features}
        return cls(features, isinstance(model, AdversarialRecommender))

    def cause(self, updated: bool) -> str:
        """The cause and its remedy; what it can be depends on whether the parameters were updated before."""
        huge = {name: float(np.abs(x.astype(np.float64)).max(initial=0.0)) for name, x in self.features.items()}
        huge = {name: size for name, size in huge.items() if not size < _HUGE}
        if huge:
            name = max(huge, key=lambda name: np.inf if np.isnan(huge[name]) else huge[name])
            return f"the {name} features reach {huge[name]:.3g}, for which no model is made: scale their rows to norm 1"
        if not updated:
            return (
                "nothing was updated before, so a hyper-parameter of the loss is too large or too small, not the step"
            )
        perturbed = ", the adversarial epsilon or its weight" if self.adversarial else ""
        return f"the parameters grew without bound: lower the learning rate{perturbed}, or clip the gradient (max_norm)"

    def kept(self, epochs: int, best: int) -> str:
        """Which checkpoints there are after so many finished epochs, and where one can go on."""
        if self.checkpoints is None:
            return "No checkpoint was asked for, so nothing is kept."
        if not epochs:
            return (
                "No epoch was finished, so there is no checkpoint: start again with other settings, in the same place."
            )
        return (
            f"The checkpoints of epoch {epochs} and of the best one, {best}, are kept in {self.checkpoints}; other "
            "settings are another training, in another place."
        )
