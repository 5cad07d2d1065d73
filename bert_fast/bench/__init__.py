"""Benchmarks of kernels and models: `bert-fast bench` times, checks, compares and draws them."""
