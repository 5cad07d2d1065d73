"""Optimizers: LAMB, parameter groups, learning rate schedules."""
