"""Benchmarks of single ops: `python -m benchmarks.ops.<op>` compares the implementations of an op with their peers."""
