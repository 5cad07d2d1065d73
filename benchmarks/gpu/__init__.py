"""What a machine with a CUDA device runs: the whole run, compute-sanitizer, targets."""
