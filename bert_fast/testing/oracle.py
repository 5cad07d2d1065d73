"""`assert_matches_oracle`: the whole contract of an op, for a function that is no implementation yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.cases import DTYPES
from bert_fast.kernels._common.third_party import registered
from bert_fast.testing.checks import CHECKS, DEFAULT_CHECKS, Finding, Target, run_check

MOST = 8  # findings in a message


class OracleError(AssertionError):
    """A kernel breaks the contract of its op.

    Attributes:
        findings: each with check, dtype, case, text and, where its results are those of a usual mistake, mistake.
    """

    def __init__(self, op: str, findings: list[Finding]) -> None:
        self.findings = findings
        shown = [f"  {finding}" for finding in findings[:MOST]]
        if len(findings) > MOST:
            shown.append(f"  ... and {len(findings) - MOST} more")
        super().__init__(f"{op}: {len(findings)} findings\n" + "\n".join(shown))


def find_mismatches(
    fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    op: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    backward: Callable[..., Mapping[str, Tensor]] | None = None,
    checks: Sequence[str] | None = None,
    own_mask: bool = False,
) -> list[Finding]:
    """Each way in which `fn` breaks the contract of `op`; the arguments of `assert_matches_oracle`."""
    unknown = sorted(set(checks or ()) - set(CHECKS))
    if unknown:
        raise ValueError(f"checks has {', '.join(unknown)}; expected some of {', '.join(CHECKS)}")
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    findings: list[Finding] = []
    with registered(op, fn, dtypes=dtypes, backward=backward) as impl:
        target = Target(op, impl, torch.device(device).type, own_mask, dtypes)
        for check in DEFAULT_CHECKS if checks is None else checks:
            for dtype in dtypes:
                findings += run_check(check, target, dtype)
    return findings


def assert_matches_oracle(
    fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    op: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] | None = None,
    backward: Callable[..., Mapping[str, Tensor]] | None = None,
    checks: Sequence[str] | None = None,
    own_mask: bool = False,
) -> None:
    """Assert that a kernel keeps the contract of an op.

    Outputs and every gradient are compared with the op's reference in float64: the error may be twice that of eager
    PyTorch in the same dtype. The dropout mask is compared to the bit; results are computed again, with other numbers
    of threads, from views of every layout, on batches without tokens and with NaN in single rows, after changes of the
    inputs in place, and with gradients of the output that are expanded or given twice.

    Args:
        fn: the kernel, as `bert_fast.kernels.register` takes it: called with the arguments of the op's public function
            as keywords, without `impl`.
        op: the op's name, e.g. "attention".
        device: where to run.
        dtypes: the dtypes that the kernel takes; None for float32, bfloat16 and float16.
        backward: its backward pass, as for `register`; None where torch's autograd has the gradient.
        checks: names from `CHECKS`; None for all but "threads" (the same bits on other numbers of CPU threads, which
            PyTorch's operators don't promise).
        own_mask: True for a kernel whose dropout mask is not that of `bert_fast/kernels/_common/philox.py`. Then the
            mask's rate and its dependence on rng_state are checked, and results with dropout are not compared.

    Raises:
        OracleError: the kernel breaks the contract; says in which case and element, and which usual mistake it looks
            like.
        TypeError, ValueError: an argument is wrong, see `register`.
    """
    findings = find_mismatches(
        fn, op, device=device, dtypes=dtypes, backward=backward, checks=checks, own_mask=own_mask
    )
    if findings:
        raise OracleError(op, findings)
