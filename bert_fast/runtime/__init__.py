"""Infrastructure of training runs: ranks, parallelism, checkpoints, log, trace. Imports optim, not pretrain."""
