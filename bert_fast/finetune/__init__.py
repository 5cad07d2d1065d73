"""Fine-tuning: configuration, API, data, loop, task runs, models, report, sweep, multitask."""
