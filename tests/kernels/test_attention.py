"""attention: every implementation against the reference, forward and backward."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels import ImplUnavailableError, attention, available_impls
from bert_fast.kernels._common.philox import dropout_multiplier, dropout_threshold
from bert_fast.kernels.attention.reference import attention_reference
from bert_fast.testing import assert_three_way, outputs_and_gradients, three_way

# Lengths around a tile of keys (8, 16, 32) and of queries (6), a block of queries (48), and empty sequences at both
# ends and in the middle. D: an odd one, below a vector, and BERT's.
LENGTHS = {
    "one token": [1],
    "two": [2],
    "mixed": [1, 2, 63, 64, 65, 127, 199],
    "empty ones": [0, 7, 0, 0, 49, 0],
    "tiles": [6, 8, 15, 16, 17, 31, 32, 33, 47, 48],
}
DTYPES = [torch.float32, torch.bfloat16]
RNG_STATE = torch.tensor([0x123456789ABCDEF, 0x7654321FEDCBA98])


def native_impls() -> list[str]:
    return [impl for impl, found in available_impls()["attention"].items() if found.ok and impl != "reference"]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compare(impl: str, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, dropout_p: float) -> None:
    cu_seqlens, total, longest = cumulative(lengths), sum(lengths), max(lengths, default=0)
    inputs = {"qkv": torch.randn(total, 3, heads, dim), "bias": torch.randn(3, heads, dim)}

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(
            qkv,
            cu_seqlens,
            longest,
            bias=bias,
            dropout_p=dropout_p,
            rng_state=RNG_STATE if dropout_p else None,
            impl=impl,
        )

    def reference(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention_reference(qkv, bias, cu_seqlens, longest, dim**-0.5, dropout_p, RNG_STATE)

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(total, heads, dim),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reference_is_scaled_dot_product_attention(dtype: torch.dtype) -> None:
    """The definition itself, against PyTorch's operator a sequence at a time."""
    lengths = [3, 0, 17, 1]
    cu_seqlens = cumulative(lengths)
    qkv, bias = torch.randn(21, 3, 2, 5, dtype=dtype), torch.randn(3, 2, 5, dtype=dtype)
    out = attention(qkv, cu_seqlens, 17, bias=bias, softmax_scale=0.7, impl="reference")
    for part, found in zip((qkv + bias).split(lengths), out.split(lengths), strict=True):
        query, key, value = part.permute(1, 2, 0, 3).unbind(0)
        expected = F.scaled_dot_product_attention(query, key, value, scale=0.7).transpose(0, 1)
        assert torch.allclose(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 5), (3, 32), (2, 64)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_matches_reference(
    impl: str,
    lengths: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    dropout_p: float,
    poisoned_empty: None,
) -> None:
    compare(impl, lengths, heads, dim, dtype, dropout_p)


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 128), (1, 33)])
def test_matches_reference_at_512(impl: str, heads: int, dim: int, dtype: torch.dtype, poisoned_empty: None) -> None:
    compare(impl, [512, 3], heads, dim, dtype, 0.1)


@pytest.mark.parametrize("impl", native_impls())
def test_longer_than_a_block_of_depth(impl: str, poisoned_empty: None) -> None:
    """Several blocks of keys (128) and of queries, whose number shrinks as the rows get longer."""
    compare(impl, [1500], 1, 16, torch.float32, 0.0)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_nothing_to_do(impl: str) -> None:
    for lengths in ([], [0], [0, 0, 0]):
        qkv = torch.zeros(0, 3, 2, 8, requires_grad=True)
        bias = torch.ones(3, 2, 8, requires_grad=True)
        out = attention(qkv, cumulative(lengths), 0, bias=bias, dropout_p=0.1, impl=impl)
        dqkv, dbias = torch.autograd.grad(out.sum(), (qkv, bias))
        assert out.shape == (0, 2, 8)
        assert dqkv.shape == qkv.shape
        assert torch.equal(dbias, torch.zeros(3, 2, 8))


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
@pytest.mark.parametrize("lengths", [[20, 0, 3, 32]], ids=str)
def test_dropout_is_the_defined_mask_to_the_bit(impl: str, lengths: list[int]) -> None:
    """Equal scores and unit values lay the dropped probabilities open: out[t, n, j] = multiplier(n, t, j) / length."""
    heads, dim, total = 3, 32, sum(lengths)
    qkv = torch.zeros(total, 3, heads, dim)
    for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
        qkv[start : start + length, 2] = torch.eye(length, dim).unsqueeze(1)
    for dropout_p in (0.1, 0.5, 1 / 256):
        out = attention(qkv, cumulative(lengths), 32, dropout_p=dropout_p, rng_state=RNG_STATE, impl=impl)
        multiplier = dropout_multiplier(RNG_STATE, dropout_p, heads, total, dim).transpose(0, 1)
        scale = 256 / (256 - dropout_threshold(dropout_p))
        for start, length in zip(cumulative(lengths).tolist(), lengths, strict=False):
            found, expected = out[start : start + length, :, :length], multiplier[start : start + length, :, :length]
            assert torch.equal(found != 0, expected != 0)
            assert torch.allclose(found.max(), torch.tensor(scale / max(length, 1))) if length else True


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_change_nothing(impl: str, dtype: torch.dtype) -> None:
    """A sequence alone and in a pack, between others: the same bits, forward and backward."""
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


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_nothing_leaks_between_sequences(impl: str) -> None:
    """NaN and infinity in one sequence leave the others and their gradients finite."""
    qkv = torch.randn(30, 3, 2, 16)
    qkv[10:20] = float("nan")
    qkv[12] = float("inf")
    qkv.requires_grad_()
    out = attention(qkv, cumulative([10, 10, 10]), 10, impl=impl)
    (dqkv,) = torch.autograd.grad(out[:10].sum() + out[20:].sum(), qkv)
    assert out[:10].isfinite().all()
    assert out[20:].isfinite().all()
    assert out[10:20].isnan().all()
    assert dqkv[:10].isfinite().all()
    assert dqkv[20:].isfinite().all()


@pytest.mark.parametrize("impl", native_impls())
def test_large_scores(impl: str) -> None:
    """Scores of several thousand: the row maximum keeps exp in range, and one key takes all."""
    qkv = 60 * torch.randn(40, 3, 2, 16, dtype=torch.float64)
    expected = attention(qkv, cumulative([40]), 40, impl="reference")
    out = attention(qkv.float(), cumulative([40]), 40, impl=impl)
    # A score of 10^4 carries an error of 10^4 eps, which is the relative error of its exponential.
    assert torch.allclose(out.double(), expected, rtol=0, atol=1e4 * torch.finfo(torch.float32).eps * 200)


@pytest.mark.parametrize("impl", native_impls())
def test_same_bits_again_and_with_other_thread_counts(impl: str) -> None:
    lengths = [70, 3, 128, 0, 33, 64, 1, 90]
    total = sum(lengths)
    qkv, bias, dout = torch.randn(total, 3, 4, 32), torch.randn(3, 4, 32), torch.randn(total, 4, 32)

    def run() -> list[Tensor]:
        leaves = [qkv.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = attention(
            leaves[0], cumulative(lengths), 128, bias=leaves[1], dropout_p=0.1, rng_state=RNG_STATE, impl=impl
        )
        return [out, *torch.autograd.grad(out, leaves, dout)]

    threads = torch.get_num_threads()
    try:
        first = run()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_any_strides(impl: str) -> None:
    cu_seqlens = cumulative([9, 4])
    views = {
        "heads before parts": torch.randn(13, 2, 3, 8).transpose(1, 2),
        "wider rows": torch.randn(13, 3, 2, 24)[..., 8:16],
        "every other number": torch.randn(13, 3, 2, 16)[..., ::2],
        "tokens last": torch.randn(3, 2, 8, 13).permute(3, 0, 1, 2),
        "one token for all": torch.randn(1, 3, 2, 8).expand(13, 3, 2, 8),
    }
    for name, qkv in views.items():
        leaf, dense = (
            qkv.detach().requires_grad_(),
            qkv.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
        )
        out, expected = attention(leaf, cu_seqlens, 9, impl=impl), attention(dense, cu_seqlens, 9, impl=impl)
        dout = torch.randn(2, 13, 8).transpose(0, 1)
        found, wanted = torch.autograd.grad(out, leaf, dout)[0], torch.autograd.grad(expected, dense, dout)[0]
        assert torch.allclose(out, expected, atol=1e-6), name
        assert torch.allclose(found, wanted, atol=1e-6), name


def test_autocast_takes_its_dtype_and_leaves_the_bias_its_own() -> None:
    qkv, bias = torch.randn(12, 3, 2, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(qkv, cumulative([5, 7]), 7, bias=bias)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert qkv.grad is not None
    assert bias.grad is not None
    assert qkv.grad.dtype == bias.grad.dtype == torch.float32
    expected = attention(qkv.detach(), cumulative([5, 7]), 7, bias=bias.detach())
    # Rounding q, k and v to bfloat16 moves scores of size 1 by some eps of it.
    assert torch.allclose(out.float(), expected, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


def test_seed_of_torch_draws_the_dropout_mask() -> None:
    qkv, cu_seqlens = torch.randn(12, 3, 2, 8), cumulative([5, 7])
    torch.manual_seed(7)
    first, second = (attention(qkv, cu_seqlens, 7, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(attention(qkv, cu_seqlens, 7, dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("impl", native_impls())
def test_opcheck(impl: str) -> None:
    qkv, bias, cu_seqlens = torch.randn(12, 3, 2, 8, requires_grad=True), torch.randn(3, 2, 8), cumulative([5, 0, 7])
    rest = (cu_seqlens, 7, 0.3, 0.25, RNG_STATE)
    torch.library.opcheck(torch.ops.bert_fast.attention_fwd.default, (qkv, bias.requires_grad_(), *rest))
    torch.library.opcheck(torch.ops.bert_fast.attention_fwd.default, (qkv, None, cu_seqlens, 7, 0.3, 0.0, None))
    out, lse = torch.ops.bert_fast.attention_fwd(qkv.detach(), bias.detach(), *rest)
    arguments = (torch.randn(12, 2, 8), qkv.detach(), bias.detach(), out, lse, *rest)
    torch.library.opcheck(torch.ops.bert_fast.attention_bwd.default, arguments)


@pytest.mark.parametrize("impl", native_impls())
def test_lse_is_the_logarithm_of_the_sum(impl: str) -> None:
    qkv = torch.randn(12, 3, 2, 8)
    _, lse = torch.ops.bert_fast.attention_fwd(qkv, None, cumulative([5, 7]), 7, 0.3, 0.0, None)
    for rows in (slice(0, 5), slice(5, 12)):
        scores = torch.einsum("ind,jnd->nij", qkv[rows, 0].double(), qkv[rows, 1].double()) * 0.3
        assert torch.allclose(lse[:, rows].double(), scores.logsumexp(-1), atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_compiles_whole(impl: str, compile_backend: str) -> None:
    qkv, bias = torch.randn(12, 3, 2, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)

    def function(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, 9, bias=bias, dropout_p=0.1, rng_state=RNG_STATE, impl=impl)

    # Inductor's own code for the reference adds nothing to know but minutes: what matters is that it traces.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if impl == "reference" else compile_backend)
    for lengths in ([5, 7], [9, 3]):
        cu_seqlens = cumulative(lengths)
        out, expected = compiled(qkv, bias, cu_seqlens), function(qkv, bias, cu_seqlens)
        found = torch.autograd.grad(out.square().sum(), (qkv, bias))
        wanted = torch.autograd.grad(expected.square().sum(), (qkv, bias))
        for a, b in zip((out, *found), (expected, *wanted), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # sums of 12 terms of size 10 in another order


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=5),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("impl", native_impls())
def test_any_lengths(impl: str, lengths: list[int], heads: int, dim: int, dropout_p: float, seed: int) -> None:
    torch.manual_seed(seed)
    compare(impl, lengths, heads, dim, torch.float32, dropout_p)


def test_bad_input_is_named() -> None:
    qkv, cu_seqlens = torch.randn(12, 3, 2, 8), cumulative([5, 7])
    with pytest.raises(ValueError, match=r"qkv has shape \(12, 2, 8\); expected \(T, 3, N, D\)"):
        attention(qkv[:, 0], cu_seqlens, 7)
    with pytest.raises(TypeError, match=r"qkv is torch\.int64; expected a floating-point tensor"):
        attention(qkv.long(), cu_seqlens, 7)
    with pytest.raises(ValueError, match=r"bias has shape \(3, 16\); expected \(3, 2, 8\)"):
        attention(qkv, cu_seqlens, 7, bias=torch.zeros(3, 16))
    with pytest.raises(TypeError, match=r"cu_seqlens is torch\.int64; expected torch\.int32"):
        attention(qkv, cu_seqlens.long(), 7)
    with pytest.raises(ValueError, match="runs from 0 to 11; expected from 0 to 12"):
        attention(qkv, cumulative([5, 6]), 7)
    with pytest.raises(ValueError, match="falls from 15 to 12 at index 2"):
        attention(qkv, cumulative([15, -3]), 20)
    with pytest.raises(ValueError, match="a sequence of 7 tokens; expected at most max_seqlen = 6"):
        attention(qkv, cu_seqlens, 6)
    with pytest.raises(ValueError, match="max_seqlen is -1"):
        attention(qkv, cu_seqlens, -1)
    with pytest.raises(ValueError, match=r"dropout_p is 1\.0"):
        attention(qkv, cu_seqlens, 7, dropout_p=1.0)
    with pytest.raises(TypeError, match=r"rng_state is torch\.int32; expected torch\.int64"):
        attention(qkv, cu_seqlens, 7, dropout_p=0.1, rng_state=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="head dimension D of at least 1"):
        attention(qkv[..., :0], cu_seqlens, 7)
    with pytest.raises(ImplUnavailableError, match=r"impl='cuda' not built yet.*Available here: reference"):
        attention(qkv, cu_seqlens, 7, impl="cuda")


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize(
    ("ends", "message"),
    [([1, 12], "runs from 1 to 12"), ([0, 13], "to 13"), ([0, 15, 12], "steps by 15"), ([0, 3, 1, 12], "steps by -2")],
    ids=str,
)
def test_operators_refuse_lengths_that_would_read_out_of_bounds(impl: str, ends: list[int], message: str) -> None:
    """What the door checks only where it may read values, the native kernel checks always."""
    qkv, cu_seqlens = torch.randn(12, 3, 2, 8), torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bert_fast.attention_fwd(qkv, None, cu_seqlens, 12, 0.3, 0.0, None)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.bert_fast.attention_bwd(
            qkv[:, 0], qkv, None, qkv[:, 0], torch.zeros(2, 12), cu_seqlens, 12, 0.3, 0.0, None
        )


@pytest.mark.parametrize("impl", native_impls())
def test_explicit_request_never_falls_back(impl: str) -> None:
    with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16; the input is torch\.float64"):
        attention(torch.randn(2, 3, 1, 4).double(), cumulative([2]), 2, impl=impl)
