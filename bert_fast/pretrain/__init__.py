"""Pretraining: config, setup, trainer, resume, step, CUDA graph, micro-batches, divergence, metrics, report.

pretrain and finetune import runtime, and runtime imports optim; never the reverse.
"""
