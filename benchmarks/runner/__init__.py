"""Measuring: devices and timing, the runner of cases, whole models, and the other runtimes on a CPU."""
