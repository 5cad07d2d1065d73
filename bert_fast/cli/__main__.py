"""`python -m bert_fast.cli`, and `torchrun -m bert_fast.cli`: the same as `bert-fast`."""

import sys

from bert_fast.cli.main import main

sys.exit(main())
