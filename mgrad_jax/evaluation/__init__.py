"""Evaluation: metrics and full-sort ranking, on the device; lists of what to recommend."""

from mgrad_jax.evaluation.recommendation import recommend

__all__ = ["recommend"]
