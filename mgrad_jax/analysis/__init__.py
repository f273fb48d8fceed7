"""The paper's analyses: comparisons of trainings, robustness, their statistics and tables (docs/experiments.md)."""
