"""padding: unpad and pad, every implementation against the reference and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, available_impls, pad, unpad

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


def impls() -> list[str]:
    return [impl for impl, found in available_impls()["padding"].items() if found.ok]


def check_round_trip(x: Tensor, mask: Tensor, impl: str) -> None:
    """unpad against indexing with the mask, pad against masking: both move values and change none."""
    real = mask.bool()
    found = unpad(x, mask, impl=impl)
    lengths = real.sum(1)
    assert torch.equal(found.x, x[real])
    assert torch.equal(found.indices, real.flatten().nonzero().squeeze(1))
    assert found.cu_seqlens.dtype == torch.int32
    assert torch.equal(found.cu_seqlens.long(), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]))
    assert found.max_seqlen == (int(lengths.max()) if len(lengths) else 0)
    back = pad(found.x, found.indices, *mask.shape, impl=impl)
    assert torch.equal(
        back, torch.where(real.view(*real.shape, *[1] * (x.dim() - 2)), x, torch.zeros((), dtype=x.dtype))
    )


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_any_mask(impl: str, mask: list[list[int]], poisoned_empty: None) -> None:
    attention_mask = torch.tensor(mask)
    check_round_trip(torch.randn(*attention_mask.shape, 5), attention_mask, impl)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(impl: str, dtype: torch.dtype) -> None:
    x = (100 * torch.randn(3, 4, 7)).to(dtype)
    check_round_trip(x, torch.tensor(MASKS["holes"]), impl)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("trailing", [(), (1,), (6,), (2, 3, 4), (0,)], ids=str)
def test_any_trailing_shape(impl: str, trailing: tuple[int, ...]) -> None:
    check_round_trip(torch.randn(3, 4, *trailing), torch.tensor(MASKS["holes"]), impl)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16], ids=str
)
def test_any_dtype_of_the_mask(impl: str, dtype: torch.dtype) -> None:
    check_round_trip(torch.randn(3, 4, 2), torch.tensor(MASKS["holes"]).to(dtype), impl)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_batch(impl: str, shape: tuple[int, int]) -> None:
    check_round_trip(torch.randn(*shape, 5), torch.ones(shape), impl)


@pytest.mark.parametrize("impl", impls())
def test_rows_shared_by_threads(impl: str) -> None:
    """Enough bytes for several threads, with stretches of padding across their borders."""
    mask = torch.rand(64, 128) > 0.5
    mask[10:14] = False
    mask[30:34] = True
    check_round_trip(torch.randn(64, 128, 96), mask, impl)


@pytest.mark.parametrize("impl", impls())
def test_strided_input(impl: str) -> None:
    x, mask = torch.randn(4, 3, 10).transpose(0, 1)[..., ::2], torch.tensor(MASKS["holes"]).t().contiguous().t()
    check_round_trip(x, mask, impl)
    found = unpad(x, mask, impl=impl)
    wide = torch.randn(found.x.shape[0], 10)[:, ::2]
    assert torch.equal(
        pad(wide, found.indices, 3, 4, impl=impl), pad(wide.contiguous(), found.indices, 3, 4, impl=impl)
    )


@pytest.mark.parametrize("impl", impls())
def test_gradients_are_the_other_function(impl: str) -> None:
    mask = torch.tensor(MASKS["holes"])
    x = torch.randn(3, 4, 5, requires_grad=True)
    found = unpad(x, mask, impl=impl)
    dout = torch.randn_like(found.x)
    (dx,) = torch.autograd.grad(found.x, x, dout)
    assert torch.equal(dx, pad(dout, found.indices, 3, 4, impl=impl))

    packed = torch.randn(found.x.shape, requires_grad=True)
    dpadded = torch.randn(3, 4, 5)
    (dpacked,) = torch.autograd.grad(pad(packed, found.indices, 3, 4, impl=impl), packed, dpadded)
    assert torch.equal(dpacked, dpadded[mask.bool()])


@pytest.mark.parametrize("impl", impls())
def test_gradcheck(impl: str) -> None:
    mask = torch.tensor(MASKS["an empty sequence"])
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    indices = unpad(x, mask, impl=impl).indices

    def there_and_back(x: Tensor) -> Tensor:
        return pad(unpad(x, mask, impl=impl).x.square(), indices, 3, 4, impl=impl)

    assert torch.autograd.gradcheck(there_and_back, (x,))
    assert torch.autograd.gradgradcheck(there_and_back, (x,))


@pytest.mark.parametrize("impl", impls())
def test_padding_never_leaks(impl: str) -> None:
    mask = torch.tensor(MASKS["holes"])
    x = torch.randn(3, 4, 5).masked_fill(mask.unsqueeze(-1) == 0, float("nan")).requires_grad_()
    found = unpad(x, mask, impl=impl)
    padded = pad(found.x, found.indices, 3, 4, impl=impl)
    (dx,) = torch.autograd.grad(padded.square().sum(), x)
    assert padded.isfinite().all()
    assert torch.equal(dx, 2 * padded)


@pytest.mark.parametrize("impl", impls())
@settings(deadline=None, max_examples=50, derandomize=True)
@given(batch=st.integers(0, 6), seqlen=st.integers(0, 20), width=st.integers(0, 9), data=st.data())
def test_any_mask_at_all(impl: str, batch: int, seqlen: int, width: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=batch * seqlen, max_size=batch * seqlen))
    mask = torch.tensor(bits, dtype=torch.bool).view(batch, seqlen)
    check_round_trip(torch.arange(batch * seqlen * width).view(batch, seqlen, width) + 1, mask, impl)


@pytest.mark.skipif("cpu" not in impls(), reason="no native kernels in this build")
def test_opcheck() -> None:
    mask = torch.tensor(MASKS["holes"]).bool()
    x = torch.randn(12, 5, requires_grad=True)
    indices, _ = torch.ops.bert_fast.unpad_indices(mask)
    torch.library.opcheck(torch.ops.bert_fast.unpad_indices.default, (mask,))
    torch.library.opcheck(torch.ops.bert_fast.gather_rows.default, (x, indices))
    packed = torch.randn(indices.shape[0], 5, requires_grad=True)
    torch.library.opcheck(torch.ops.bert_fast.scatter_rows.default, (packed, indices, 12))


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_compiles_whole(impl: str, compile_backend: str) -> None:
    """T comes out of the mask's values, and one compiled function serves every T."""

    def function(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found = unpad(x, mask, impl=impl)
        return pad(found.x.sin(), found.indices, *mask.shape, impl=impl), found.cu_seqlens

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if impl == "reference" else compile_backend)
    x = torch.randn(3, 4, 5, requires_grad=True)
    for name in ("holes", "right padded", "an empty sequence"):
        mask = torch.tensor(MASKS[name])
        (out, cu_seqlens), (expected, expected_cu_seqlens) = compiled(x, mask), function(x, mask)
        assert torch.allclose(out, expected, atol=1e-6)
        assert torch.equal(cu_seqlens, expected_cu_seqlens)
        found, wanted = (torch.autograd.grad(y.sum(), x)[0] for y in (out, expected))
        assert torch.allclose(found, wanted, atol=1e-6)


def test_max_seqlen_while_tracing_is_the_padded_length(compile_backend: str) -> None:
    mask = torch.tensor(MASKS["an empty sequence"])
    x = torch.randn(3, 4, 5)
    assert unpad(x, mask).max_seqlen == 2
    bound = torch.compile(
        lambda x, mask: x.new_full((1,), unpad(x, mask).max_seqlen), fullgraph=True, backend=compile_backend
    )
    assert bound(x, mask).item() == 4


def test_bad_input_is_named() -> None:
    x, mask = torch.randn(3, 4, 5), torch.tensor(MASKS["holes"])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(4, 3\); expected \(3, 4\)"):
        unpad(x, mask.t())
    with pytest.raises(ValueError, match=r"attention_mask has the values 2, 3; expected only 1 .* and 0"):
        unpad(x, mask * 2 + torch.tensor([1, 0, 0, 0]) * mask)
    with pytest.raises(ValueError, match=r"attention_mask has the values -inf; .*additive mask"):
        unpad(x, torch.zeros(3, 4).masked_fill(mask == 0, float("-inf")))
    with pytest.raises(ValueError, match="attention_mask has the values nan"):
        unpad(x, torch.full((3, 4), float("nan")))
    with pytest.raises(TypeError, match=r"attention_mask is list; expected a torch\.Tensor"):
        unpad(x, mask.tolist())
    with pytest.raises(ValueError, match=r"x has shape \(5,\); expected \(B, S, ...\)"):
        unpad(x[0, 0], mask)
    packed, indices = x[mask.bool()], unpad(x, mask).indices
    with pytest.raises(TypeError, match=r"indices is torch\.int32; expected torch\.int64"):
        pad(packed, indices.int(), 3, 4)
    with pytest.raises(ValueError, match=r"indices has shape \(6,\); expected \(5,\)"):
        pad(packed[:-1], indices, 3, 4)
    with pytest.raises(ValueError, match="indices runs from 0 to 11; expected it to rise strictly within 0 to 7"):
        pad(packed, indices, 2, 4)
    with pytest.raises(ValueError, match="rise strictly"):
        pad(packed, indices.flip(0), 3, 4)
    with pytest.raises(ValueError, match="batch is -1 and seqlen 4"):
        pad(packed, indices, -1, 4)
    with pytest.raises(ImplUnavailableError, match=r"impl='triton' not built yet.*Available here: reference"):
        unpad(x, mask, impl="triton")


@pytest.mark.skipif("cpu" not in impls(), reason="no native kernels in this build")
@pytest.mark.parametrize("indices", [[-1, 2], [0, 12], [3, 3], [5, 2]], ids=str)
def test_operators_refuse_indices_that_would_reach_out_of_bounds(indices: list[int]) -> None:
    """What the door checks only where it may read values, the native kernels check always."""
    places = torch.tensor(indices)
    with pytest.raises(RuntimeError, match="expected it to rise strictly within 0 to 11"):
        torch.ops.bert_fast.gather_rows(torch.randn(12, 5), places)
    with pytest.raises(RuntimeError, match="expected it to rise strictly within 0 to 11"):
        torch.ops.bert_fast.scatter_rows(torch.randn(2, 5), places, 12)
