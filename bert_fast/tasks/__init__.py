"""Tasks: how rows become model inputs, losses, predictions and metrics."""
