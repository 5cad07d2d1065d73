"""Scripts for a GPU: the run of `make gpu`, compute-sanitizer, and the targets of recorded results."""
