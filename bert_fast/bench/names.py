"""How variants are called, in reports and in the pages and tables of them."""

OURS = "bert_fast"  # variants whose name starts with it are ours, the others are peers
YARDSTICK = "copy of as many bytes"  # neither: a plain copy of the minimal traffic, timed in the same way
COMPILED = "torch.compile"  # in the names of variants
