"""Optimizers: options, LAMB, parameter groups, the learning-rate schedule. Imports nothing of runtime or pretrain."""
