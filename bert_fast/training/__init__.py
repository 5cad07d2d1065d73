"""Training: configurations, optimizers, schedules, the loops of pretraining and fine-tuning, checkpoints and logs."""
