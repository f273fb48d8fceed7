"""The paper's analyses as functions: comparisons of trainings, robustness, their statistics and tables (docs/experiments.md)."""
