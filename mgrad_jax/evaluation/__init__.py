"""Evaluation: metrics and full-sort ranking, on the device."""
