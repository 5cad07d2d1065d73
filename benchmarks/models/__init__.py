"""Benchmarks of whole models: inference, training steps, data, and the demo."""
