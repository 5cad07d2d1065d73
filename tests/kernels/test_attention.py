"""attention: every implementation against the reference, forward and backward."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels import attention
from bert_fast.kernels._common import dispatch, triton_launch
from bert_fast.kernels._common.library import simulated
from bert_fast.kernels._common.philox import dropout_multiplier, dropout_threshold
from bert_fast.kernels._common.triton_launch import assumed_architecture
from bert_fast.kernels.attention.reference import attention_reference
from bert_fast.testing import assert_three_way, operators, outputs_and_gradients, targets, three_way

# Lengths around a tile of keys (8, 16, 32) and of queries (6), a block of queries (48), and empty sequences at both
# ends and in the middle. D: an odd one, below a vector, and BERT's.
LENGTHS = {
    "one token": [1],
    "two": [2],
    "mixed": [1, 2, 63, 64, 65, 127, 199],
    "empty ones": [0, 7, 0, 0, 49, 0],
    "tiles": [6, 8, 15, 16, 17, 31, 32, 33, 47, 48],
}
# The cases of the Triton kernels. In float32: whole blocks of 32 and tails, of keys and of queries. In 16 bits:
# sequences in tiles of 4 x 16, of 2 x 32, a tile of 64 or 128 for each with two and three chunks of queries, whole and
# not, several programs of each; above 128 tokens whole blocks and a tail. D whole and padded, to 16 and to 64.
INTERPRETED = [("one token", 1, 5), ("two", 2, 64), ("empty ones", 1, 64), ("128", 1, 32)]
INTERPRETED_16_BITS = [*INTERPRETED, ("four a tile", 2, 32), ("two a tile", 1, 5), ("blocks", 1, 40)]
CASES = [(lengths, heads, dim) for lengths in LENGTHS for heads, dim in ((1, 5), (3, 32), (2, 64))]
LENGTHS_OF_TRITON = {"four a tile": [16, 1, 0, 5, 9], "two a tile": [17, 32, 0], "128": [66, 3], "blocks": [150, 3]}
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16]
# `targets` leaves out the reference on the CPU, which defines the op.
REFERENCE = ("reference", "cpu")
OURS = [target for target in targets("attention") if target[0] != "reference"]


def rng_state(device: str | torch.device) -> Tensor:
    return torch.tensor([0x123456789ABCDEF, 0x7654321FEDCBA98], device=device)


def cumulative(lengths: list[int], device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def compare(
    impl: str, device: str, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, dropout_p: float
) -> None:
    cu_seqlens, total, longest = cumulative(lengths, device), sum(lengths), max(lengths, default=0)
    inputs = {
        "qkv": torch.randn(total, 3, heads, dim, device=device),
        "bias": torch.randn(3, heads, dim, device=device),
    }
    state = rng_state(device)

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(
            qkv,
            cu_seqlens,
            longest,
            bias=bias,
            dropout_p=dropout_p,
            rng_state=state if dropout_p else None,
            impl=impl,
        )

    def reference(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention_reference(qkv, bias, cu_seqlens, longest, dim**-0.5, dropout_p, state)

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(total, heads, dim, device=device),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_is_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    """The reference compared with PyTorch's operator, one sequence at a time."""
    lengths = [3, 0, 17, 1]
    cu_seqlens = cumulative(lengths)
    qkv, bias = torch.randn(21, 3, 2, 5, dtype=dtype), torch.randn(3, 2, 5, dtype=dtype)
    out = attention(qkv, cu_seqlens, 17, bias=bias, softmax_scale=0.7, impl="reference")
    for part, results in zip((qkv + bias).split(lengths), out.split(lengths), strict=True):
        query, key, value = part.permute(1, 2, 0, 3).unbind(0)
        expected = F.scaled_dot_product_attention(query, key, value, scale=0.7).transpose(0, 1)
        # Sums of 5 products and of up to 17 weights: 16 eps are 4 eps of values of up to 4.
        assert torch.allclose(results, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "lengths", "heads", "dim"),
    targets("attention", CASES, interpreted=INTERPRETED, dtypes=[torch.float32])
    + targets("attention", CASES, interpreted=INTERPRETED_16_BITS, dtypes=[torch.bfloat16, torch.float16]),
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
    compare(impl, device, (LENGTHS | LENGTHS_OF_TRITON)[lengths], heads, dim, dtype, dropout_p)


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "lengths", "heads", "dim"),
    targets(
        "attention",
        [([512, 3], 1, 64), ([512, 3], 2, 128), ([512, 3], 1, 33), ([512, 3], 1, 256)],
        interpreted=[([70, 3], 1, 128), ([40], 1, 256)],  # the tiles of these D: several blocks each way
        dtypes=DTYPES,
    ),
    ids=str,
)
def test_matches_reference_at_512(
    impl: str, device: str, dtype: torch.dtype, lengths: list[int], heads: int, dim: int, poisoned_empty: None
) -> None:
    compare(impl, device, lengths, heads, dim, dtype, 0.1)


@pytest.mark.parametrize("family", [80, 100])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "lengths", "dim"),
    [
        target
        for target in targets(
            "attention", interpreted=[([150, 3], 64), ([150, 3], 128), ([66, 3], 32)], dtypes=[torch.bfloat16]
        )
        if simulated(target[0]) and target[0] == "triton"
    ],
    ids=str,
)
def test_tiles_of_other_architectures_match_the_reference(
    impl: str, device: str, dtype: torch.dtype, lengths: list[int], dim: int, family: int, poisoned_empty: None
) -> None:
    with assumed_architecture(family):
        compare(impl, device, lengths, 1, dim, dtype, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] == "triton"])
@pytest.mark.parametrize("lengths", [[40], [150]], ids=["one block of keys", "several"])
def test_equal_keys_share_the_weight_of_large_scores(
    impl: str, device: str, lengths: list[int], dtype: torch.dtype
) -> None:
    """Scores of 1e12: where a GPU fuses s * scale - m * scale, its rounding error is beyond the bounds of exp."""
    total = lengths[0]
    qkv = torch.zeros(total, 3, 1, 16, dtype=dtype, device=device)
    qkv[:, :2, :, 0] = 1e6
    qkv[1::2, 1, :, 0] = 1.0  # every other key scores lower by far
    qkv[:, 2] = torch.randn(total, 1, 16, device=device).to(dtype)
    out = attention(qkv, cumulative(lengths, device), total, softmax_scale=1.1, impl=impl)
    expected = qkv[::2, 2].double().mean(dim=0).expand(total, 1, 16)
    # 75 weights and values of up to 4: a rounding of each weight and one of the result.
    assert torch.allclose(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_two_programs_fit_an_sm_on_hopper() -> None:
    """The forward kernel of BERT's D without dropout, by its limit of registers; padded D would spill."""
    tiles = pytest.importorskip("bert_fast.kernels.attention.triton.tiles")
    limits = {
        (family, size, dim, dropout): tiles.long_launch(family, size, dim, 64, dropout).fwd.maxnreg
        for family in (80, 90, 100)
        for size in (2, 4)
        for dim in (40, 64)
        for dropout in (False, True)
    }
    assert limits.pop((90, 2, 64, False)) == 128
    assert set(limits.values()) <= {None, 255}


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)],
    ids=str,
)
def test_a_device_belongs_to_the_family_of_its_matrix_instructions(
    capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    dispatch._family.cache_clear()
    assert triton_launch.family(torch.device("cuda", 0)) == expected
    dispatch._family.cache_clear()
    with triton_launch.assumed_architecture(capability[0] * 10 + capability[1]):
        assert triton_launch.family(torch.device("cpu")) == expected
    assert triton_launch.family(torch.device("cpu")) == 90


# Several blocks of 64 rows and several steps over the other side in each D that the kernels are compiled for, whole and
# padded, moved 16 bytes at a time (D a multiple of 8) and number by number.
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [*((dim, dtype) for dim in (24, 32, 61, 64, 128, 200) for dtype in DTYPES), (64, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] == "cuda"])
def test_tiles_of_the_cuda_kernels(
    impl: str, device: str, dim: int, dtype: torch.dtype, dropout_p: float, poisoned_empty: None
) -> None:
    compare(impl, device, [130, 0, 64, 1], 2, dim, dtype, dropout_p)


@pytest.mark.parametrize(("impl", "device"), targets("attention", interpreted=[]))
def test_longer_than_a_block_of_depth(impl: str, device: str, poisoned_empty: None) -> None:
    """Several blocks of keys (128) and of queries; longer rows have smaller query blocks."""
    compare(impl, device, [1500], 1, 16, torch.float32, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), OURS)
@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(impl: str, device: str, scale: float, dtype: torch.dtype) -> None:
    """Below 0 the smallest product has the largest score; at 0 all keys have the same weight."""
    cu_seqlens, inputs = cumulative([9, 4], device), {"qkv": torch.randn(13, 3, 2, 8, device=device)}

    def ours(qkv: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, 9, softmax_scale=scale, impl=impl)

    def reference(qkv: Tensor) -> Tensor:
        return attention_reference(qkv, None, cu_seqlens, 9, scale, 0.0, None)

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(13, 2, 8, device=device),)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("impl", "device", "lengths"),
    # In 16 bits the regimes of Triton: several sequences in a tile, one in a tile, blocks of keys.
    targets("attention", [([9, 4, 47],)], interpreted=[([9, 4, 11],), ([9, 4, 47],), ([9, 4, 150],)]),
    ids=str,
)
@pytest.mark.parametrize("magnitude", [1.0, 1e4])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-4, 1.0, 1e4, 1e30, -1e30])
def test_scores_of_any_magnitude(
    impl: str, device: str, lengths: list[int], scale: float, magnitude: float, dtype: torch.dtype
) -> None:
    """Between the mean of the values and that of the highest score's key. Equal keys share their weight: the rounding
    error of scale q k, which is larger than any bound of exp, must not tell them apart.

    Queries and keys are small integers, whose scores are exact: of almost equal ones eager PyTorch's rounding may take
    another for the highest.
    """
    check_scores_of_any_magnitude(impl, device, lengths, 8, scale, magnitude, dtype)


def check_scores_of_any_magnitude(
    impl: str, device: str, lengths: list[int], dim: int, scale: float, magnitude: float, dtype: torch.dtype
) -> None:
    cu_seqlens, total, longest = cumulative(lengths, device), sum(lengths), max(lengths)
    qkv = torch.randn(total, 3, 2, dim, device=device)
    qkv[:, :2] = torch.randint(-3, 4, (total, 2, 2, dim), device=device)
    qkv[:, 0] *= magnitude
    qkv[1:4, 1] = qkv[0, 1]  # the keys of tokens 0 to 3 are equal, and so are all of the second sequence
    qkv[9:13, 1] = qkv[9, 1]

    def ours(qkv: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, longest, softmax_scale=scale, impl=impl)

    def reference(qkv: Tensor) -> Tensor:
        return attention_reference(qkv, None, cu_seqlens, longest, scale, 0.0, None)

    inputs = {"qkv": qkv.to(dtype).float()}
    results = outputs_and_gradients(ours, inputs, {"qkv": dtype}, (torch.ones(total, 2, dim, device=device),))
    assert all(bool(x.isfinite().all()) for x in results.values()), results
    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.ones(total, 2, dim, device=device),)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [REFERENCE, *targets("attention")])
@pytest.mark.parametrize("lengths", [[20, 0, 3, 32]], ids=str)
def test_dropout_is_the_defined_mask_to_the_bit(impl: str, device: str, lengths: list[int], dtype: torch.dtype) -> None:
    """Equal scores and unit values expose the dropped probabilities: out[t, n, j] = multiplier(n, t, j) / length."""
    heads, dim, total = 3, 32, sum(lengths)
    qkv = torch.zeros(total, 3, heads, dim, dtype=dtype, device=device)
    for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
        qkv[start : start + length, 2] = torch.eye(length, dim, device=device).unsqueeze(1)
    state = rng_state(device)
    for dropout_p in (0.1, 0.5, 1 / 256):
        out = attention(qkv, cumulative(lengths, device), 32, dropout_p=dropout_p, rng_state=state, impl=impl)
        multiplier = dropout_multiplier(state, dropout_p, heads, total, dim).transpose(0, 1)
        scale = 256 / (256 - dropout_threshold(dropout_p))
        for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
            results, expected = out[start : start + length, :, :length], multiplier[start : start + length, :, :length]
            assert torch.equal(results != 0, expected != 0)
            # In bfloat16 a probability is rounded, and the result once more.
            if length:
                assert float(results.max()) == pytest.approx(scale / length, rel=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), OURS)
def test_neighbours_change_nothing(impl: str, device: str, dtype: torch.dtype) -> None:
    """A sequence has the same bits anywhere in the pack and between any others, forward and backward."""
    lengths = [5, 37, 70, 1]
    qkv = torch.randn(113, 3, 1, 32, device=device).to(dtype)
    dout = torch.randn(113, 1, 32, device=device).to(dtype)

    def run(lengths: list[int], qkv: Tensor, dout: Tensor) -> dict[str, Tensor]:
        cu_seqlens = cumulative(lengths, device)
        return outputs_and_gradients(
            lambda qkv: attention(qkv, cu_seqlens, 70, impl=impl), {"qkv": qkv}, {"qkv": dtype}, (dout,)
        )

    def reverse(x: Tensor) -> Tensor:
        return torch.cat(x.split(lengths)[::-1])

    results = run(lengths[::-1], reverse(qkv), reverse(dout))
    for name, expected in run(lengths, qkv, dout).items():
        assert torch.equal(results[name], reverse(expected)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] == "cpu"])
def test_alone_as_in_a_pack(impl: str, device: str, dtype: torch.dtype) -> None:
    """The same bits alone and in a pack, and for any max_seqlen that selects the same kernel, forward and backward."""
    lengths = [37, 100, 5]
    qkv, dout = torch.randn(142, 3, 2, 32).to(dtype), torch.randn(142, 2, 32).to(dtype)
    packed = outputs_and_gradients(
        lambda qkv: attention(qkv, cumulative(lengths), 100, impl=impl), {"qkv": qkv}, {"qkv": dtype}, (dout,)
    )
    for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        alone = outputs_and_gradients(
            lambda qkv: attention(qkv, cumulative([qkv.shape[0]]), 512, impl=impl),
            {"qkv": qkv[rows]},
            {"qkv": dtype},
            (dout[rows],),
        )
        assert all(torch.equal(alone[name], packed[name][rows]) for name in alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [REFERENCE, *targets("attention")])
def test_nothing_leaks_between_sequences(impl: str, device: str, dtype: torch.dtype) -> None:
    """NaN and infinity in one sequence leave the others and their gradients finite."""
    qkv = torch.randn(30, 3, 2, 16, device=device).to(dtype)
    qkv[10:20] = float("nan")
    qkv[12] = float("inf")
    qkv.requires_grad_()
    out = attention(qkv, cumulative([10, 10, 10], device), 10, impl=impl)
    (dqkv,) = torch.autograd.grad(out[:10].sum() + out[20:].sum(), qkv)
    assert out[:10].isfinite().all()
    assert out[20:].isfinite().all()
    assert out[10:20].isnan().all()
    assert dqkv[:10].isfinite().all()
    assert dqkv[20:].isfinite().all()


@pytest.mark.parametrize(("impl", "device"), OURS)
def test_large_scores(impl: str, device: str) -> None:
    """Scores of several thousand: subtracting the row maximum keeps exp in range, and one key has all the weight."""
    qkv, cu_seqlens = 60 * torch.randn(40, 3, 2, 16, device=device), cumulative([40], device)

    def run(qkv: Tensor, impl: str) -> Tensor:
        return attention(qkv, cu_seqlens, 40, impl=impl)

    ours, reference = (partial(run, impl=name) for name in (impl, "reference"))
    dout = torch.randn(40, 2, 16, device=device)
    assert_three_way(three_way(ours, reference, {"qkv": qkv}, torch.float32, (dout,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), OURS)
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_stats_are_the_highest_score_and_the_logarithm_of_the_sum(
    impl: str, device: str, scale: float, dtype: torch.dtype
) -> None:
    qkv = torch.randn(12, 3, 2, 8, device=device).to(dtype)
    _, stats = operators(impl).attention_fwd(qkv, None, cumulative([5, 7], device), 7, scale, 0.0, None)
    for rows in (slice(0, 5), slice(5, 12)):
        scores = torch.einsum("ind,jnd->nij", qkv[rows, 0].double(), qkv[rows, 1].double()) * (1 if scale > 0 else -1)
        top = scores.amax(-1)
        log2_sum = ((scores - top[..., None]) * 0.3).logsumexp(-1) / math.log(2)
        # float32: sums of 8 products and of 7 exponentials, of up to 10 and 7.
        assert torch.allclose(stats[:, :, rows].double(), torch.stack([top, log2_sum]), atol=2e-6)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=5),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize(("impl", "device"), targets("attention", interpreted=[]))
def test_any_lengths(
    impl: str, device: str, lengths: list[int], heads: int, dim: int, dropout_p: float, seed: int
) -> None:
    torch.manual_seed(seed)
    compare(impl, device, lengths, heads, dim, torch.float32, dropout_p)


@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] == "cpu"])
@pytest.mark.parametrize(
    ("ends", "message"),
    [([1, 12], "runs from 1 to 12"), ([0, 13], "to 13"), ([0, 15, 12], "steps by 15"), ([0, 3, 1, 12], "steps by -2")],
    ids=str,
)
def test_operators_refuse_lengths_that_would_read_out_of_bounds(
    impl: str, device: str, ends: list[int], message: str
) -> None:
    """The public function checks values only where it may read them, the CPU kernel always."""
    qkv, cu_seqlens = torch.randn(12, 3, 2, 8), torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bert_fast.attention_fwd(qkv, None, cu_seqlens, 12, 0.3, 0.0, None)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bert_fast.attention_bwd(
            qkv[:, 0], qkv, None, qkv[:, 0], torch.zeros(2, 2, 12), cu_seqlens, 12, 0.3, 0.0, None
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] in ("triton", "cuda")])
@pytest.mark.parametrize(
    "ends", [[1, 12], [0, 13], [0, 15, 12], [0, 3, 1, 12], [-5, 2**31 - 1], [-(2**31), 5, 2**31 - 1]], ids=str
)
def test_no_lengths_read_out_of_bounds(impl: str, device: str, ends: list[int], dtype: torch.dtype) -> None:
    """Where values are not checked, the kernels stay within the pack; the memory around it is NaN."""
    around = torch.full((36, 3, 2, 8), float("nan"), dtype=dtype, device=device)
    qkv = around[12:24].normal_()
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    out, stats = operators(impl).attention_fwd(qkv, None, cu_seqlens, 12, 0.3, 0.0, None)
    dout = torch.randn(12, 2, 8, dtype=dtype, device=device)
    dqkv, _ = operators(impl).attention_bwd(dout, qkv, None, out, stats, cu_seqlens, 12, 0.3, 0.0, None)
    rows = {t for start, end in pairwise(ends) for t in range(max(start, 0), min(end, start + 12, 12))}
    covered = sorted(rows)
    assert out[covered].isfinite().all()
    assert stats[:, :, covered].isfinite().all()
    assert dqkv[covered].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] in ("triton", "cuda")])
def test_rows_behind_the_last_sequence_are_zero(
    impl: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    """A pack of static shape, whose last rows belong to no sequence; cu_seqlens repeats its last entry."""
    qkv, bias = torch.randn(40, 3, 2, 8, dtype=dtype, device=device), torch.randn(3, 2, 8, device=device)
    dout = torch.randn(40, 2, 8, dtype=dtype, device=device)

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


@pytest.mark.parametrize(("impl", "device"), [target for target in OURS if target[0] in ("triton", "cuda")])
def test_too_large_a_head_is_named(impl: str, device: str) -> None:
    named = {"triton": "Triton", "cuda": "CUDA"}[impl]
    with pytest.raises(ValueError, match=f"head dimension D of 257; the {named} kernels take at most 256"):
        attention(torch.randn(2, 3, 1, 257, device=device), cumulative([2], device), 2, impl=impl)
