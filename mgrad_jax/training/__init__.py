"""Training: the epoch program, early stopping, run directories."""

from mgrad_jax.training.fit import EpochReport, FitResult, TrainingDiverged, fit

__all__ = ["EpochReport", "FitResult", "TrainingDiverged", "fit"]
