"""The trainer: steps, checkpoints, evaluation, metrics."""
