"""Scripts for a GPU: `make gpu-check` and `make gpu-bench`, verification, compute-sanitizer, and targets."""
