"""Pretraining: configuration, optimizers, schedule, loop, checkpoints and logs."""
