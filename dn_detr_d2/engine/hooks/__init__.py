"""Hooks of a training: checkpoints, the moving average, early and graceful ends, evaluations that are repeated."""
