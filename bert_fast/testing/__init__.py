"""Is a kernel right? `assert_matches_oracle` for anybody's kernel, and the three-way test that everything here uses.

`pytest --bert-fast-op attention --bert-fast-impl package:function` runs the same checks, one test a check and dtype.
"""

from bert_fast.testing.checks import CHECKS, DEFAULT_CHECKS
from bert_fast.testing.oracle import Finding, OracleError, assert_matches_oracle, find_mismatches
from bert_fast.testing.three_way import (
    FACTOR,
    FLOOR_ULPS,
    Comparison,
    assert_three_way,
    compare,
    max_error,
    operators,
    outputs_and_gradients,
    targets,
    three_way,
)

__all__ = [
    "CHECKS",
    "DEFAULT_CHECKS",
    "FACTOR",
    "FLOOR_ULPS",
    "Comparison",
    "Finding",
    "OracleError",
    "assert_matches_oracle",
    "assert_three_way",
    "compare",
    "find_mismatches",
    "max_error",
    "operators",
    "outputs_and_gradients",
    "targets",
    "three_way",
]
