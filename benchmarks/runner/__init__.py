"""Measuring: devices and timing, the runner of cases, and the other runtimes on a CPU."""
