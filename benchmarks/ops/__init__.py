"""Benchmarks of single ops: `python -m benchmarks.ops <op>` compares an op's implementations with its peers."""
