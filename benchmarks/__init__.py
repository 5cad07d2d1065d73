"""Benchmarks: `python -m benchmarks.bench_<room>` sets the implementations of a room beside their peers."""
