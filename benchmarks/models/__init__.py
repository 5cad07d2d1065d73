"""Benchmarks of whole models: inference, training steps and the input pipeline; and the demo."""
