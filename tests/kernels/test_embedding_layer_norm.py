"""embedding_layer_norm: every implementation against the reference, forward and backward, with and without dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import embedding_layer_norm
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels._common.triton_support import INTERPRETED
from bert_fast.kernels.embedding_layer_norm.reference import embedding_layer_norm_reference
from bert_fast.testing import assert_three_way, compare, operators, targets, three_way

# Columns: every BERT size, then odd ones around the vector widths (4, 8, 16) and the 16 columns of one dropout draw.
# Tokens: none, one, odd, more than one reduction part (16), more than two chunks of one table row (64).
SHAPES = [(9, 128), (17, 256), (33, 384), (301, 512), (37, 768), (5, 1024), (0, 16), (1, 3), (3, 7), (19, 33), (7, 271)]
# In Triton: nothing; less than a tile of 512 elements and a chunk of 16 tokens; an odd E over three parts of the sums
# over rows, the last one not full, and two levels of chunks; three blocks of 256 columns, the last one not full.
INTERPRETED_SHAPES = [(0, 16), (3, 7), (19, 33), (2, 515)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARY, POSITIONS, TYPES = 97, 53, 2
OP = "embedding_layer_norm"
TABLES_AND_PARAMETERS = ("word", "token_type", "position", "weight", "bias")


def rng_state(device: str | torch.device) -> Tensor:
    return torch.tensor([-(2**62) + 12345, 2**40 + 7], device=device)


def random_inputs(tokens: int, cols: int, device: str = "cpu") -> dict[str, Tensor]:
    """Half of the tokens have id 3: one table row is read by many tokens, most by none."""
    inputs = {
        "input_ids": torch.randint(0, VOCABULARY, (tokens,)).where(torch.rand(tokens) < 0.5, 3),
        "token_type_ids": torch.randint(0, TYPES, (tokens,)),
        "position_ids": torch.arange(tokens).remainder(POSITIONS),
        "word": torch.randn(VOCABULARY, cols),
        "token_type": torch.randn(TYPES, cols),
        "position": torch.randn(POSITIONS, cols),
        "weight": 1 + 0.5 * torch.randn(cols),
        "bias": torch.randn(cols),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def functions(
    impl: str, dropout_p: float = 0.0, eps: float = 1e-12, padding_idx: int | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def state(inputs: dict[str, Tensor]) -> Tensor | None:
        return rng_state(inputs["word"].device) if dropout_p else None

    def ours(**inputs: Tensor) -> Tensor:
        return embedding_layer_norm(
            **inputs, dropout_p=dropout_p, eps=eps, padding_idx=padding_idx, rng_state=state(inputs), impl=impl
        )

    def reference(**inputs: Tensor) -> Tensor:
        return embedding_layer_norm_reference(
            **inputs,
            dropout_p=dropout_p,
            eps=eps,
            padding_idx=padding_idx,
            rng_state=state(inputs),
            out_dtype=inputs["word"].dtype,
        )

    return ours, reference


def with_gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}


def gradients(out: Tensor, inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    names = [name for name, x in inputs.items() if x.requires_grad]
    return dict(zip(names, torch.autograd.grad(out, [inputs[name] for name in names], dout), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["keep all", "dropout"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "tokens", "cols"),
    targets(OP, SHAPES, interpreted=INTERPRETED_SHAPES, dtypes=DTYPES),
    ids=str,
)
def test_matches_reference(
    impl: str, device: str, dtype: torch.dtype, tokens: int, cols: int, dropout_p: float, poisoned_empty: None
) -> None:
    ours, reference = functions(impl, dropout_p)
    inputs, dout = random_inputs(tokens, cols, device), torch.randn(tokens, cols, device=device)
    assert_three_way(three_way(ours, reference, inputs, dtype, (dout,)))


@pytest.mark.parametrize(("impl", "device", "tokens"), targets(OP, [(9,)], interpreted=[(3,)]))
def test_the_widest_rows(impl: str, device: str, tokens: int, poisoned_empty: None) -> None:
    """Just below 8192 columns; nine tokens are two partial sums. All of them read the same table rows."""
    ours, reference = functions(impl, 0.1)
    inputs, dout = random_inputs(tokens, 8190, device), torch.randn(tokens, 8190, device=device)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        inputs[name].fill_(1)
    assert_three_way(three_way(ours, reference, inputs, torch.bfloat16, (dout,)))


@pytest.mark.parametrize(("impl", "device", "tokens"), targets(OP, [(2000,)], interpreted=[(90,)]))
def test_table_rows_of_many_tokens(impl: str, device: str, tokens: int, poisoned_empty: None) -> None:
    """In Triton three levels of chunks, and more of them on a GPU: 16 tokens, then 32 sums of those below."""
    ours, reference = functions(impl, padding_idx=1)
    inputs, dout = random_inputs(tokens, 16, device), torch.randn(tokens, 16, device=device)
    inputs["input_ids"] = torch.arange(tokens, device=device) % 3 + 50 * (torch.arange(tokens, device=device) % 17 == 5)
    inputs["position_ids"] = inputs["position_ids"] % 2 * 52
    inputs["token_type_ids"].fill_(1)
    assert_three_way(three_way(ours, reference, inputs, torch.float32, (dout,)))


@pytest.mark.parametrize("rows", [2**15 - 1, 2**15])
@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_the_last_rows_of_large_tables(impl: str, device: str, rows: int, poisoned_empty: None) -> None:
    """Up to 2^15 - 1 rows in all tables together Triton sorts the tokens by a key of 16 bits."""
    inputs, dout = random_inputs(5, 16, device), torch.randn(5, 16, device=device)
    words = rows - TYPES - POSITIONS
    inputs["word"] = torch.randn(words, 16, device=device)
    inputs["input_ids"] = torch.tensor([words - 1, 0, words - 2, words - 1, 1], device=device)
    inputs["position_ids"] += POSITIONS - 5
    inputs["token_type_ids"].fill_(TYPES - 1)
    ours, reference = functions(impl, padding_idx=words - 2)
    assert_three_way(three_way(ours, reference, inputs, torch.float32, (dout,)))


@pytest.mark.parametrize(("impl", "device", "tokens"), targets(OP, [(50,)], interpreted=[(20,)]))
def test_int32_ids_give_the_same_bits(impl: str, device: str, tokens: int) -> None:
    inputs = random_inputs(tokens, 40, device)
    narrow = {name: x if x.is_floating_point() else x.int() for name, x in inputs.items()}
    ours, _ = functions(impl)
    wide_leaves, narrow_leaves = with_gradients(inputs), with_gradients(narrow)
    outs, dout = (ours(**wide_leaves), ours(**narrow_leaves)), torch.randn(tokens, 40, device=device)
    assert torch.equal(*outs)
    expected, results = gradients(outs[0], wide_leaves, dout), gradients(outs[1], narrow_leaves, dout)
    assert all(torch.equal(expected[name], results[name]) for name in expected)


@pytest.mark.parametrize(
    ("impl", "device", "tokens"), [("reference", "cpu", 200), *targets(OP, [(200,)], interpreted=[(20,)])]
)
def test_padding_row_gets_no_gradient_and_the_others_keep_theirs(impl: str, device: str, tokens: int) -> None:
    inputs = random_inputs(tokens, 24, device)
    grads = []
    for padding_idx in (None, 3):
        leaves = with_gradients(inputs)
        out = functions(impl, padding_idx=padding_idx)[0](**leaves)
        grads.append(gradients(out, leaves, torch.ones(tokens, 24, device=device).tril()))
    plain, padded = grads
    assert plain["word"][3].abs().max() > 0
    assert (padded["word"][3] == 0).all()
    plain["word"][3] = 0
    for name in TABLES_AND_PARAMETERS:
        if (impl, device) == ("reference", "cuda"):  # PyTorch's own sums there have no order
            assert torch.allclose(plain[name], padded[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(plain[name], padded[name])


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_rows_that_no_token_reads_get_zero(impl: str, device: str, poisoned_empty: None) -> None:
    leaves = with_gradients(random_inputs(20, 24, device))
    grads = gradients(functions(impl)[0](**leaves), leaves, torch.randn(20, 24, device=device))
    unread = torch.ones(VOCABULARY, dtype=torch.bool, device=device).index_fill(0, leaves["input_ids"], False)
    assert unread.any()
    assert (grads["word"][unread] == 0).all()
    assert (grads["position"][20:] == 0).all()


@pytest.mark.parametrize(
    ("impl", "device", "tokens"),
    # 300 are enough for sums in bfloat16 to be wrong by several times the bound.
    [target for target in targets(OP, [(3000,)], interpreted=[(300,)]) if target[0] != "reference"],
)
def test_sums_of_many_bfloat16_rows_are_made_in_float32(impl: str, device: str, tokens: int) -> None:
    """A bfloat16 sum of equal terms stops growing after 256 of them. Few table rows make the sums long."""
    inputs = random_inputs(tokens, 16, device)
    for name, rows in (("input_ids", 10), ("token_type_ids", 1), ("position_ids", 4)):
        inputs[name] %= rows
    inputs = cast(inputs, torch.bfloat16)
    leaves = with_gradients(inputs)
    dout = (torch.rand(tokens, 16, device=device) * torch.arange(16, device=device)).bfloat16()
    results = gradients(functions(impl)[0](**leaves), leaves, dout)
    exact = with_gradients(cast(inputs, torch.float64))
    truth = gradients(functions("reference")[1](**exact), exact, dout.double())
    for name in TABLES_AND_PARAMETERS:
        scale = truth[name].abs().max()
        assert (results[name] - truth[name]).abs().max() <= torch.finfo(torch.bfloat16).eps * scale, name


@pytest.mark.parametrize(
    ("impl", "device", "tokens", "cols"),
    [("reference", "cpu", 41, 389), *targets(OP, [(41, 389)], interpreted=[(11, 389)])],
)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_drops_exactly_the_elements_of_the_definition(
    impl: str, device: str, tokens: int, cols: int, dropout_p: float
) -> None:
    inputs = random_inputs(tokens, cols, device)
    inputs["bias"] += 100.0  # nothing is zero by itself
    out = functions(impl, dropout_p)[0](**inputs)
    multiplier = dropout_multiplier(rng_state(device), dropout_p, 1, tokens, cols)[0].float()
    assert torch.equal(out == 0, multiplier == 0)
    assert torch.equal(out, functions(impl)[0](**inputs) * multiplier)


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_constant_rows_give_the_bias(impl: str, device: str) -> None:
    inputs = with_gradients(random_inputs(6, 771, device))
    with torch.no_grad():
        for name, value in (("word", 12345.678), ("token_type", 0.0), ("position", 0.0)):
            inputs[name].fill_(value)
    out = functions(impl)[0](**inputs)
    assert torch.equal(out, inputs["bias"].expand(6, 771))
    assert all(x.isfinite().all() for x in gradients(out, inputs, torch.randn(6, 771, device=device)).values())


@pytest.mark.parametrize(("impl", "device", "tokens"), targets(OP, [(21,)], interpreted=[(5,)]))
def test_rows_far_from_zero(impl: str, device: str, tokens: int) -> None:
    """E[x^2] - E[x]^2 would cancel completely. The inputs are exact in every dtype."""
    inputs = random_inputs(tokens, 768, device)
    for name in ("word", "token_type", "position"):
        inputs[name] = (inputs[name] * 64).round() / 64
    inputs["word"] += 1e4
    ours, reference = functions(impl)
    assert_three_way(three_way(ours, reference, inputs, torch.float32, (torch.randn(tokens, 768, device=device),)))


@pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), *targets(OP)])
def test_autocast_rounds_once_and_leaves_the_tables_alone(impl: str, device: str) -> None:
    inputs = with_gradients(random_inputs(25, 24, device))
    ours, _ = functions(impl, 0.1)
    with torch.autocast(device, torch.bfloat16):
        out = ours(**inputs)
    assert out.dtype == torch.bfloat16
    exact = ours(**inputs)
    if impl == "triton" and INTERPRETED:  # the interpreter cuts off what a GPU rounds
        assert ((out - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs()).all()
    else:
        assert torch.equal(out, exact.bfloat16())
    dout = torch.randn(25, 24, device=device).bfloat16()
    results = gradients(out, inputs, dout)
    expected = gradients(ours(**inputs), inputs, dout.float())
    for name in TABLES_AND_PARAMETERS:
        assert results[name].dtype == torch.float32
        # dout has the same values in both dtypes, and both sum 25 rows in float32: 8 eps.
        assert torch.allclose(results[name], expected[name], rtol=1e-6, atol=1e-6)


def test_autocast_to_a_dtype_that_no_cpu_kernel_takes() -> None:
    inputs = random_inputs(25, 24)
    native = "cpu" in {impl for impl, _ in targets(OP)}
    for table_dtype in (torch.float32, torch.bfloat16):
        tables = cast(inputs, table_dtype)
        with torch.autocast("cpu", torch.float16):
            out = embedding_layer_norm(**tables)
        eager = embedding_layer_norm(**tables, impl="reference")
        assert out.dtype == torch.float16
        assert torch.equal(out, eager.half()) == (table_dtype == torch.float32 or not native)
        exact = embedding_layer_norm(**cast(tables, torch.float64))
        # float16 rounds once more, which the floor of the bound allows.
        assert_three_way([compare("out", out, eager.half(), exact)])


@pytest.mark.parametrize("impl", [impl for impl, _ in targets(OP) if impl == "cpu"])
def test_operators_check_for_themselves(impl: str) -> None:
    """The kernels refuse what would make them read out of bounds, as the public function does."""
    inputs = random_inputs(5, 24)

    def fwd(**changed: object) -> None:
        operators(impl).embedding_layer_norm_fwd(*(inputs | changed).values(), 0.0, 1e-12, None, None, torch.float32)

    with pytest.raises(RuntimeError, match="input_ids has the value 97 at 0; expected 0 to 96"):
        fwd(input_ids=torch.full((5,), 97))
    with pytest.raises(RuntimeError, match="position_ids has the value -1 at 4; expected 0 to 52"):
        fwd(position_ids=torch.tensor([0, 1, 2, 3, -1], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="token_type_ids has size 4 in dimension 0; expected 5"):
        fwd(token_type_ids=inputs["token_type_ids"][1:])
    with pytest.raises(RuntimeError, match="position has size 23 in dimension 1; expected 24"):
        fwd(position=inputs["position"][:, 1:])
    with pytest.raises(RuntimeError, match="token_type has an unexpected dtype"):
        fwd(token_type=inputs["token_type"].bfloat16())


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("impl", "device"), [target for target in targets(OP) if target[0] == "triton"])
def test_ids_outside_their_tables_read_the_nearest_row(impl: str, device: str, index_dtype: torch.dtype) -> None:
    """The public function does not read ids on a GPU: whatever they are, the kernels stay inside the tables."""
    inputs = random_inputs(6, 24, device)
    far = torch.iinfo(index_dtype)
    rows = {"input_ids": VOCABULARY, "token_type_ids": TYPES, "position_ids": POSITIONS}
    for name, count in rows.items():
        inputs[name] = torch.tensor([-1, count, far.min, far.max, 0, count - 1], dtype=index_dtype, device=device)
    nearest = inputs | {name: inputs[name].clamp(0, count - 1) for name, count in rows.items()}
    dout, statistics = torch.randn(6, 24, device=device), torch.rand(2, 6, device=device)

    def run(*values: Tensor) -> list[Tensor]:
        out = operators(impl).embedding_layer_norm_fwd(*values, 0.0, 1e-12, 0, None, torch.float32)
        return [*out, *operators(impl).embedding_layer_norm_bwd(dout, *values[:-1], *statistics, 0.0, 0, None)]

    for results, expected in zip(run(*inputs.values()), run(*nearest.values()), strict=True):
        assert torch.equal(results, expected)


@pytest.mark.parametrize(("impl", "device"), [target for target in targets(OP) if target[0] == "triton"])
def test_triton_operators_check_for_themselves(impl: str, device: str) -> None:
    inputs, fwd = random_inputs(5, 24, device), operators(impl).embedding_layer_norm_fwd
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 and rng_state is None; expected an int64 \(2,\)"):
        fwd(*inputs.values(), 0.1, 1e-12, None, None, torch.float32)
    inputs["position"] = inputs["position"][:0]
    with pytest.raises(ValueError, match=r"the tables have \[97, 2, 0\] rows; expected at least one each"):
        fwd(*inputs.values(), 0.0, 1e-12, None, None, torch.float32)
