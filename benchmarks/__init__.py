"""Benchmarks and reports: single ops, whole models, compile tables, and everything that runs on a GPU."""
