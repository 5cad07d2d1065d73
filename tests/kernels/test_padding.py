"""padding: unpad and pad, every implementation against the reference and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bert_fast.kernels import available_impls, pad, unpad
from bert_fast.testing import operators, targets

MASKS = {
    "right padded": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left padded": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
    "an empty sequence": [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
    "nothing real": [[0, 0], [0, 0]],
    "one token": [[1]],
}
DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
]

# The reference is tested too: all are compared with boolean indexing.
TARGETS = [("reference", "cpu"), *targets("padding")]
NATIVE = available_impls()["padding"]["cpu"].ok


def check_round_trip(x: Tensor, mask: Tensor, impl: str) -> None:
    """unpad equals indexing with the mask, pad equals masking, to the bit."""
    real = mask.bool()
    unpadded = unpad(x, mask, impl=impl)
    lengths = real.sum(1)
    assert torch.equal(unpadded.x, x[real])
    assert torch.equal(unpadded.indices, real.flatten().nonzero().squeeze(1))
    assert unpadded.cu_seqlens.dtype == torch.int32
    assert torch.equal(unpadded.cu_seqlens.long(), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
    assert unpadded.max_seqlen == (int(lengths.max()) if len(lengths) else 0)
    back = pad(unpadded.x, unpadded.indices, *mask.shape, impl=impl)
    assert torch.equal(back, torch.where(real.view(*real.shape, *[1] * (x.dim() - 2)), x, x.new_zeros(())))


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_any_mask(impl: str, device: str, mask: list[list[int]], poisoned_empty: None) -> None:
    attention_mask = torch.tensor(mask, device=device)
    check_round_trip(torch.randn(*attention_mask.shape, 5, device=device), attention_mask, impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(impl: str, device: str, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(3, 4, 7, device=device)).to(dtype)
    check_round_trip(x, torch.tensor(MASKS["holes"], device=device), impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("trailing", [(), (1,), (6,), (2, 3, 4), (0,)], ids=str)
def test_any_trailing_shape(impl: str, device: str, trailing: tuple[int, ...]) -> None:
    check_round_trip(torch.randn(3, 4, *trailing, device=device), torch.tensor(MASKS["holes"], device=device), impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16], ids=str
)
def test_any_dtype_of_the_mask(impl: str, device: str, dtype: torch.dtype) -> None:
    mask = torch.tensor(MASKS["holes"], device=device).to(dtype)
    check_round_trip(torch.randn(3, 4, 2, device=device), mask, impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_batch(impl: str, device: str, shape: tuple[int, int]) -> None:
    check_round_trip(torch.randn(*shape, 5, device=device), torch.ones(shape, device=device), impl)


# For threads, enough bytes for several, with stretches of padding across their borders. A Triton program of the
# interpreted cases holds part of a row of the mask (1,030 columns: two parts of 1,024), 16 rows of 16 or 64 columns,
# looks at 128 indices at once, and has to search twice in about 500; 2,049 columns are two programs a row, and 3 bytes
# a row are copied one by one.
@pytest.mark.parametrize(
    ("impl", "device", "batch", "seqlen", "width", "dtype"),
    [
        ("reference", "cpu", 64, 128, 96, torch.float32),
        *targets(
            "padding",
            [(64, 128, 96, torch.float32), (3, 8200, 5, torch.float16), (2, 70, 4200, torch.float32)],
            interpreted=[
                (2, 1030, 34, torch.float32),
                (1, 40, 2049, torch.int64),
                (40, 3, 3, torch.uint8),
            ],
        ),
    ],
    ids=str,
)
def test_rows_shared_by_threads_and_programs(
    impl: str, device: str, batch: int, seqlen: int, width: int, dtype: torch.dtype, poisoned_empty: None
) -> None:
    mask = torch.rand(batch, seqlen, device=device) > 0.5
    mask[batch // 6 : batch // 4] = False
    mask[batch // 2 : batch // 2 + 4] = True
    check_round_trip((100 * torch.rand(batch, seqlen, width, device=device)).to(dtype), mask, impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("start", [1, 2, 4, 8])
def test_memory_that_starts_anywhere(impl: str, device: str, start: int) -> None:
    """Rows of 16 bytes that are aligned to `start` bytes only."""
    x = torch.randint(0, 255, (12 * 16 + start,), dtype=torch.uint8, device=device)[start:].view(3, 4, 16)
    check_round_trip(x, torch.tensor(MASKS["holes"], device=device), impl)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_gradients_are_the_other_function(impl: str, device: str) -> None:
    mask = torch.tensor(MASKS["holes"], device=device)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    unpadded = unpad(x, mask, impl=impl)
    dout = torch.randn_like(unpadded.x)
    (dx,) = torch.autograd.grad(unpadded.x, x, dout)
    assert torch.equal(dx, pad(dout, unpadded.indices, 3, 4, impl=impl))

    packed = torch.randn(unpadded.x.shape, device=device, requires_grad=True)
    dpadded = torch.randn(3, 4, 5, device=device)
    (dpacked,) = torch.autograd.grad(pad(packed, unpadded.indices, 3, 4, impl=impl), packed, dpadded)
    assert torch.equal(dpacked, dpadded[mask.bool()])


# `fast` compares products with random vectors in the place of whole Jacobians.
@pytest.mark.parametrize(
    ("impl", "device", "fast"), [("reference", "cpu", False), *targets("padding", [(False,)], interpreted=[(True,)])]
)
def test_gradcheck(impl: str, device: str, fast: bool) -> None:
    mask = torch.tensor(MASKS["an empty sequence"], device=device)
    x = torch.randn(3, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    indices = unpad(x, mask, impl=impl).indices

    def there_and_back(x: Tensor) -> Tensor:
        return pad(unpad(x, mask, impl=impl).x.square(), indices, 3, 4, impl=impl)

    assert torch.autograd.gradcheck(there_and_back, (x,), fast_mode=fast)
    assert torch.autograd.gradgradcheck(there_and_back, (x,), fast_mode=fast)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_padding_never_leaks(impl: str, device: str) -> None:
    mask = torch.tensor(MASKS["holes"], device=device)
    x = torch.randn(3, 4, 5, device=device).masked_fill(mask.unsqueeze(-1) == 0, float("nan")).requires_grad_()
    unpadded = unpad(x, mask, impl=impl)
    padded = pad(unpadded.x, unpadded.indices, 3, 4, impl=impl)
    (dx,) = torch.autograd.grad(padded.square().sum(), x)
    assert padded.isfinite().all()
    assert torch.equal(dx, 2 * padded)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@settings(deadline=None, max_examples=50, derandomize=True)
@given(batch=st.integers(0, 6), seqlen=st.integers(0, 20), width=st.integers(0, 9), data=st.data())
def test_any_mask_at_all(impl: str, device: str, batch: int, seqlen: int, width: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen))
    mask = torch.tensor(bits, dtype=torch.bool, device=device).view(batch, seqlen)
    check_round_trip(torch.arange(batch * seqlen * width, device=device).view(batch, seqlen, width) + 1, mask, impl)


@pytest.mark.parametrize(("impl", "device"), [*TARGETS, ("auto", "cpu")])
def test_compiles_whole(impl: str, device: str, compile_backend: str) -> None:
    """T depends on the mask's values; one compiled function serves every T."""

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        results = unpad(x, mask, impl=impl)
        return pad(results.x.sin(), results.indices, *mask.shape, impl=impl), results.cu_seqlens

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if impl == "reference" else compile_backend)
    x = torch.randn(3, 4, 5, device=device, requires_grad=True)
    for name in ("holes", "right padded", "an empty sequence"):
        mask = torch.tensor(MASKS[name], device=device)
        (out, cu_seqlens), (expected, expected_cu_seqlens) = compiled(x, mask), function(x, mask)
        # float32: the compiled sine and cosine, of size 1, may differ from eager ones by an ulp or two (6e-8 each).
        assert torch.allclose(out, expected, atol=1e-6)
        assert torch.equal(cu_seqlens, expected_cu_seqlens)
        results, expected_gradient = (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected))
        assert torch.allclose(results, expected_gradient, atol=1e-6)


@pytest.mark.gpu
def test_pad_in_a_cuda_graph() -> None:
    """Forward and backward, replayed with other values at as many other positions."""
    first, second = (torch.tensor(MASKS[name], device="cuda") for name in ("holes", "left padded"))
    second[1, 0], second[2, 0] = 1, 0
    x = torch.randn(int(first.sum()), 40, device="cuda", requires_grad=True)
    new, dout = torch.randn_like(x), torch.randn(3, 4, 40, device="cuda")
    indices, places = (unpad(mask, mask, impl="triton").indices for mask in (first, second))

    def both(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        out = pad(x, indices, 3, 4, impl="triton")
        return out.detach(), torch.autograd.grad(out, x, dout)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both(x, indices)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(x, indices)
    with torch.no_grad():
        x.copy_(new)
    indices.copy_(places[: len(indices)])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0].flatten(0, 1)[indices], new)
    assert int(captured[0].any(-1).sum()) == len(indices)
    assert torch.equal(captured[1], dout.flatten(0, 1)[indices])


def test_max_seqlen_while_tracing_is_the_padded_length(compile_backend: str) -> None:
    mask = torch.tensor(MASKS["an empty sequence"])
    x = torch.randn(3, 4, 5)
    assert unpad(x, mask).max_seqlen == 2
    bound = torch.compile(
        lambda x, mask: x.new_full((1,), unpad(x, mask).max_seqlen), fullgraph=True, backend=compile_backend
    )
    assert bound(x, mask).item() == 4


OUT_OF_BOUNDS = [[-1, 2], [0, 12], [3, 3], [5, 2]]


@pytest.mark.skipif(not NATIVE, reason="no native kernels in this build")
@pytest.mark.parametrize("indices", OUT_OF_BOUNDS, ids=str)
def test_operators_refuse_indices_that_would_reach_out_of_bounds(indices: list[int]) -> None:
    """The public function checks values only where it may read them, the CPU kernels always."""
    places = torch.tensor(indices)
    with pytest.raises(RuntimeError, match="expected it to rise strictly within 0 to 11"):
        torch.ops.bert_fast.gather_rows(torch.randn(12, 5), places)
    with pytest.raises(RuntimeError, match="expected it to rise strictly within 0 to 11"):
        torch.ops.bert_fast.scatter_rows(torch.randn(2, 5), places, 12)


@pytest.mark.parametrize(("impl", "device"), [target for target in targets("padding") if target[0] == "triton"])
@pytest.mark.parametrize("indices", [*OUT_OF_BOUNDS, [-(2**62), 2**62]], ids=str)
def test_triton_reaches_nothing_out_of_bounds(impl: str, device: str, indices: list[int]) -> None:
    """Indices are not checked on the device: a row out of range reads as zeros and is not written."""
    around = torch.full((36, 5), -1.0, device=device)
    x, places = around[12:24], torch.tensor(indices, device=device)
    x.copy_(torch.rand(12, 5) + 1.0)
    gathered = operators(impl).gather_rows(x, places)
    for row, index in zip(gathered, indices, strict=True):
        assert torch.equal(row, x[index] if 0 <= index < 12 else torch.zeros_like(row))
    scattered = operators(impl).scatter_rows(x[:2], places, 12)
    rows = [torch.zeros(5, device=device), x[0], x[1]]
    assert all(any(torch.equal(results, row) for row in rows) for results in scattered)


@pytest.mark.parametrize(("impl", "device"), [target for target in targets("padding") if target[0] == "triton"])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (127, 300), (128, 128), (129, 1000), (16385, 16500)])
def test_search_finds_every_row(impl: str, device: str, tokens: int, rows: int) -> None:
    """128 indices are compared at a time: one step up to 128 of them, two up to 128^2, then three."""
    indices = torch.randperm(rows)[:tokens].sort().values.to(device)
    if tokens > 10000:  # in the interpreter the programs take time: the first and the last blocks of rows alone
        indices, rows = indices - int(indices[-1]) + 40, 41
    x = torch.randn(tokens, 2, device=device)
    expected = torch.zeros(rows, 2, device=device)
    inside = indices >= 0
    expected[indices[inside]] = x[inside]
    assert torch.equal(operators(impl).scatter_rows(x, indices, rows), expected)
