"""Benchmarks: `python -m benchmarks.ops.<op>` sets the implementations of an op beside their peers."""
