"""bert_fast: a BERT encoder on kernels of its own. See README.md for the map of the house."""

__version__ = "0.1.0"
