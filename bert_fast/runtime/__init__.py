"""What every training run needs: distributed ranks, parallelism, checkpoints, signals, logs, progress, tracing."""
