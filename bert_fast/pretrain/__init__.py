"""Pretraining: configuration, trainer, step, CUDA graph, micro-batches, divergence, metrics, report."""
