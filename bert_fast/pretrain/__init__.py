"""Pretraining: config, setup, trainer, step, CUDA graph, micro-batches, divergence, metrics, report."""
