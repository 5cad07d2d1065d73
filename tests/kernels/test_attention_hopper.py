"""attention's CUDA kernels for Hopper against the reference, on such a GPU or in the emulator, which emulates one.

On other GPUs the same cases run on the kernels for sm_80 and later.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import attention, available_impls
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels.attention.reference import attention_reference
from bert_fast.testing import assert_three_way, operators, outputs_and_gradients, targets, three_way

# One step of keys; several and an idle team; two passes of the teams over one fill of the rings; sequences that don't
# fit the rings (3 x 128 keys forward and 4 x 64 backward at D 128, 5 x 128 and 9 x 64 at D 64). Whole tiles and tails.
LENGTHS = {
    "one": [1, 64, 63],
    "several": [130, 0, 64, 1],
    "two passes": [300, 5, 256],
    "rings": [520],
    "longer rings": [700],
}
CASES = [(name, 2 if name == "several" else 1, dim) for name in LENGTHS for dim in (64, 128)]
CASES.remove(("longer rings", 1, 128))
FEWER = [("one", 1, 64), ("several", 2, 64), ("several", 2, 128)]
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.bfloat16, torch.float16]
OURS = [target for target in targets("attention") if target[0] == "cuda"]
STATE = (0x123456789ABCDEF, 0x7654321FEDCBA98)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERT_FAST_EMULATED_CAPABILITY", "90")


def cumulative(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def compare(
    impl: str,
    device: str,
    lengths: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    dropout_p: float,
    *,
    biased: bool = True,
    scale: float = 0.125,
) -> None:
    cu_seqlens, total, state = cumulative(lengths, device), sum(lengths), torch.tensor(STATE, device=device)
    inputs = {"qkv": torch.randn(total, 3, heads, dim, device=device)}
    if biased:
        inputs["bias"] = torch.randn(3, heads, dim, device=device)

    def ours(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        rng_state = state if dropout_p else None
        return attention(
            qkv,
            cu_seqlens,
            max(lengths),
            bias=bias,
            softmax_scale=scale,
            dropout_p=dropout_p,
            rng_state=rng_state,
            impl=impl,
        )

    def reference(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return attention_reference(qkv, bias, cu_seqlens, max(lengths), scale, dropout_p, state)

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(total, heads, dim, device=device),)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "lengths", "heads", "dim"),
    [
        target
        for cases, dtype in ((CASES, torch.bfloat16), (FEWER, torch.float16))
        for target in targets("attention", cases, dtypes=[dtype])
        if target[0] == "cuda"
    ],
    ids=str,
)
def test_matches_reference(
    impl: str,
    device: str,
    dtype: torch.dtype,
    lengths: str,
    heads: int,
    dim: int,
    dropout_p: float,
    poisoned_empty: None,
) -> None:
    compare(impl, device, LENGTHS[lengths], heads, dim, dtype, dropout_p)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_without_a_bias(impl: str, device: str, dim: int, poisoned_empty: None) -> None:
    compare(impl, device, [70, 3, 129], 2, dim, torch.bfloat16, 0.1, biased=False)


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_any_scale(impl: str, device: str, scale: float) -> None:
    compare(impl, device, [9, 66], 1, 64, torch.bfloat16, 0.0, scale=scale, biased=False)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("magnitude", [1.0, 256.0])
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30, -1e30])
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_scores_of_any_magnitude(impl: str, device: str, scale: float, magnitude: float, dim: int) -> None:
    """Equal keys share their weight, and no exponent passes 0. Integers, whose scores are exact, as for other GPUs."""
    lengths = [9, 150]
    cu_seqlens, dout = cumulative(lengths, device), torch.ones(159, 1, dim, device=device)
    qkv = torch.randn(159, 3, 1, dim, device=device)
    qkv[:, :2] = torch.randint(-3, 4, (159, 2, 1, dim), device=device)
    qkv[:, 0] *= magnitude
    qkv[1:4, 1], qkv[20:30, 1], qkv[100:110, 1] = qkv[0, 1], qkv[9, 1], qkv[9, 1]

    def run(qkv: Tensor, impl: str) -> Tensor:
        return attention(qkv, cu_seqlens, 150, softmax_scale=scale, impl=impl)

    ours, reference = (partial(run, impl=name) for name in (impl, "reference"))
    results = outputs_and_gradients(ours, {"qkv": qkv}, {"qkv": torch.bfloat16}, (dout,))
    assert all(bool(x.isfinite().all()) for x in results.values()), results
    assert_three_way(three_way(ours, reference, {"qkv": qkv}, torch.bfloat16, (dout,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device has one capability, the emulator any")
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_path_is_chosen_by_the_device(impl: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 128 keys add up in another order than steps of 64: the last bits differ, and nothing else does."""
    qkv, cu_seqlens = torch.randn(300, 3, 1, 64).bfloat16(), cumulative([300], device)
    stats = {}
    for capability in ("80", "90", "100"):
        monkeypatch.setenv("BERT_FAST_EMULATED_CAPABILITY", capability)
        stats[capability] = operators(impl).attention_fwd(qkv, None, cu_seqlens, 300, 0.3, 0.0, None)[1]
    assert torch.equal(stats["80"], stats["100"])
    assert not torch.equal(stats["80"], stats["90"])
    assert torch.allclose(stats["80"], stats["90"], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator's driver refuses on request")
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_the_kernels_for_every_gpu_run_where_the_driver_refuses_a_tensor_map(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens, dout = cumulative([70], device), torch.randn(70, 1, 64)

    def both(qkv: Tensor, capability: str) -> tuple[Tensor, ...]:
        monkeypatch.setenv("BERT_FAST_EMULATED_CAPABILITY", capability)
        out, stats = operators(impl).attention_fwd(qkv, None, cu_seqlens, 70, 0.3, 0.0, None)
        saved = (qkv, None, out, stats, cu_seqlens)
        return out, stats, *operators(impl).attention_bwd(dout.to(qkv.dtype), *saved, 70, 0.3, 0.0, None)

    qkv = [torch.randn(70, 3, 1, 64).to(dtype) for dtype in DTYPES]
    expected = [both(x, "80") for x in qkv]
    both(qkv[0], "90")
    assert "tensor map" not in available_impls()["attention"][impl].reason
    monkeypatch.setenv("BERT_FAST_EMULATED_TENSOR_MAP_ERROR", "1")
    for x, results in zip(qkv, expected, strict=True):
        assert all(map(torch.equal, both(x, "90"), results))
    reason = "without Hopper's kernels: the driver refuses a tensor map (cuTensorMapEncodeTiled, error 1)"
    state = available_impls()["attention"][impl]
    assert state.ok
    assert state.reason.endswith(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_dropout_is_the_defined_mask_to_the_bit(impl: str, device: str, dtype: torch.dtype) -> None:
    """Equal scores and unit values expose the dropped probabilities; 150 keys are two steps."""
    lengths, heads, dim, total = [20, 150], 2, 64, 170
    state, cu_seqlens = torch.tensor(STATE, device=device), cumulative(lengths, device)
    multiplier = dropout_multiplier(state, 0.25, heads, total, 150).transpose(0, 1)
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        for first in range(0, length, dim):
            columns = min(dim, length - first)
            qkv = torch.zeros(total, 3, heads, dim, dtype=dtype, device=device)
            qkv[start + first : start + first + columns, 2] = torch.eye(columns, dim, device=device).unsqueeze(1)
            out = attention(qkv, cu_seqlens, 150, dropout_p=0.25, rng_state=state, impl=impl)
            results = out[start : start + length, :, :columns]
            expected = multiplier[start : start + length, :, first : first + columns]
            assert torch.equal(results != 0, expected != 0)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_neighbours_change_nothing(impl: str, device: str, dim: int) -> None:
    """A sequence has the same bits anywhere in the pack and in every run, forward and backward."""
    lengths = [5, 137, 70, 1]
    qkv = torch.randn(213, 3, 1, dim, device=device).bfloat16()
    dout = torch.randn(213, 1, dim, device=device).bfloat16()

    def run(lengths: list[int], qkv: Tensor, dout: Tensor) -> dict[str, Tensor]:
        cu_seqlens = cumulative(lengths, device)
        dtypes = {"qkv": torch.bfloat16}
        return outputs_and_gradients(
            lambda qkv: attention(qkv, cu_seqlens, 137, impl=impl), {"qkv": qkv}, dtypes, (dout,)
        )

    def reverse(x: Tensor) -> Tensor:
        return torch.cat(x.split(lengths)[::-1])

    expected, again = run(lengths, qkv, dout), run(lengths, qkv, dout)
    results = run(lengths[::-1], reverse(qkv), reverse(dout))
    for name in expected:
        assert torch.equal(again[name], expected[name]), name
        assert torch.equal(results[name], reverse(expected[name])), name


@pytest.mark.parametrize(("impl", "device"), OURS)
def test_nothing_leaks_between_sequences(impl: str, device: str) -> None:
    """Boxes of 64 rows reach into the next sequence: NaN and infinity there leave this one and its bias finite."""
    qkv = torch.randn(30, 3, 2, 64, device=device).bfloat16()
    qkv[10:20] = float("nan")
    qkv[12] = float("inf")
    qkv.requires_grad_()
    bias = torch.zeros(3, 2, 64, device=device, requires_grad=True)
    out = attention(qkv, cumulative([10, 10, 10], device), 10, bias=bias, impl=impl)
    (dqkv,) = torch.autograd.grad(out[:10].sum() + out[20:].sum(), qkv)
    for x in (out, dqkv):
        assert x[:10].isfinite().all()
        assert x[20:].isfinite().all()
    # The same pack with the non-finite rows after the last sequence: dbias is that of sequences without them.
    finite_rows = qkv.detach()[:20]
    ends = torch.tensor([0, 10], dtype=torch.int32, device=device)
    rest = (ends, 10, 0.3, 0.0, None)
    out, stats = operators(impl).attention_fwd(finite_rows, bias, *rest)
    _, dbias = operators(impl).attention_bwd(torch.ones_like(out), finite_rows, bias, out, stats, *rest)
    assert dbias.isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_stats_are_the_highest_score_and_the_logarithm_of_the_sum(impl: str, device: str, dim: int) -> None:
    """Without the bias of the keys, which the kernel leaves out of the scores."""
    qkv, bias = torch.randn(170, 3, 2, dim, device=device).bfloat16(), torch.randn(3, 2, dim, device=device)
    _, stats = operators(impl).attention_fwd(qkv, bias, cumulative([20, 150], device), 150, 0.1, 0.0, None)
    query = (qkv[:, 0].float() + bias[0]).bfloat16().double()
    key = qkv[:, 1].double()
    for rows in (slice(0, 20), slice(20, 170)):
        scores = torch.einsum("ind,jnd->nij", query[rows], key[rows])
        top = scores.amax(-1)
        log2_sum = ((scores - top[..., None]) * 0.1).logsumexp(-1) / math.log(2)
        # float32: sums of up to 128 products, of up to 50, and of 150 exponentials.
        assert torch.allclose(stats[:, :, rows].double(), torch.stack([top, log2_sum]), atol=2e-5)


@pytest.mark.parametrize(("impl", "device"), OURS)
@pytest.mark.parametrize(
    "ends", [[1, 12], [0, 13], [0, 15, 12], [0, 3, 1, 12], [-5, 2**31 - 1], [-(2**31), 5, 2**31 - 1]], ids=str
)
def test_no_lengths_read_out_of_bounds(impl: str, device: str, ends: list[int]) -> None:
    """Where values are not checked, the kernels stay within the pack; the memory around it is NaN."""
    around = torch.full((36, 3, 2, 64), float("nan"), dtype=torch.bfloat16, device=device)
    qkv = around[12:24].normal_()
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    out, stats = operators(impl).attention_fwd(qkv, None, cu_seqlens, 12, 0.3, 0.0, None)
    dout = torch.randn(12, 2, 64, dtype=torch.bfloat16, device=device)
    dqkv, _ = operators(impl).attention_bwd(dout, qkv, None, out, stats, cu_seqlens, 12, 0.3, 0.0, None)
    rows = {t for start, end in pairwise(ends) for t in range(max(start, 0), min(end, start + 12, 12))}
    covered = sorted(rows)
    assert out[covered].isfinite().all()
    assert stats[:, :, covered].isfinite().all()
    assert dqkv[covered].isfinite().all()


@pytest.mark.parametrize(("impl", "device"), OURS)
def test_rows_behind_the_last_sequence_are_zero(impl: str, device: str, poisoned_empty: None) -> None:
    qkv = torch.randn(40, 3, 2, 64, dtype=torch.bfloat16, device=device)
    bias = torch.randn(3, 2, 64, device=device)
    dout = torch.randn(40, 2, 64, dtype=torch.bfloat16, device=device)

    def run(rows: int, lengths: list[int]) -> list[Tensor]:
        rest = (cumulative(lengths, device), 7, 0.3, 0.0, None)
        out, stats = operators(impl).attention_fwd(qkv[:rows], bias, *rest)
        return [
            out,
            stats.mT[0],
            stats.mT[1],
            *operators(impl).attention_bwd(dout[:rows], qkv[:rows], bias, out, stats, *rest),
        ]

    *padded, dbias = run(40, [5, 7, 0, 0])
    *dense, expected_dbias = run(12, [5, 7])
    for results, expected in zip(padded, dense, strict=True):
        assert torch.equal(results[:12], expected)
        assert torch.equal(results[12:], torch.zeros_like(results[12:]))
    # float32 sums of 12 rows, of which the zeros change the order: a rounding each.
    assert torch.allclose(dbias, expected_dbias, rtol=0, atol=12 * EPS * float(expected_dbias.abs().max()))


@pytest.mark.parametrize(("impl", "device"), OURS)
def test_any_strides(impl: str, device: str) -> None:
    """Layouts that the copy engine (TMA) reads in place, and layouts that take the other path."""
    cu_seqlens, dout = cumulative([9, 4], device), torch.randn(13, 2, 64, device=device)

    def run(qkv: Tensor, impl: str) -> Tensor:
        return attention(qkv, cu_seqlens, 9, impl=impl)

    ours, reference = (partial(run, impl=name) for name in (impl, "reference"))
    views = {
        "heads before parts": torch.randn(13, 2, 3, 64, device=device).bfloat16().transpose(1, 2),
        "wider rows": torch.randn(13, 3, 2, 80, device=device).bfloat16()[..., 8:72],
        "not aligned": torch.randn(13, 3, 2, 80, device=device).bfloat16()[..., 1:65],
        "one token for all": torch.randn(1, 3, 2, 64, device=device).bfloat16().expand(13, 3, 2, 64),
    }
    for qkv in views.values():
        assert_three_way(three_way(ours, reference, {"qkv": qkv}, torch.bfloat16, (dout,)))
