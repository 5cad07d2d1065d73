"""Reports that need no GPU: compile tables, the cost of the recipes, plots of recorded results."""
