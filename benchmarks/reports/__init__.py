"""Reports that need no GPU: compile tables, recipes, plots of recorded results."""
