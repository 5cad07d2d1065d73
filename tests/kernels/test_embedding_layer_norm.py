"""embedding_layer_norm: every implementation against the reference, forward and backward, with and without dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, available_impls, embedding_layer_norm
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels.embedding_layer_norm.reference import embedding_layer_norm_reference
from bert_fast.testing import assert_three_way, three_way

# Columns: every BERT size, then odd ones around the vector widths (4, 8, 16) and the 16 columns of one dropout draw.
# Tokens: none, one, odd, more than one reduction part (16), more than two chunks of one table row (64).
SHAPES = [(9, 128), (17, 256), (33, 384), (301, 512), (37, 768), (5, 1024), (0, 16), (1, 3), (3, 7), (19, 33), (7, 271)]
DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY, POSITIONS, TYPES = 97, 53, 2
RNG_STATE = torch.tensor([-(2**62) + 12345, 2**40 + 7])
TABLES_AND_PARAMETERS = ("word", "token_type", "position", "weight", "bias")


def native_impls() -> list[str]:
    return [
        impl for impl, found in available_impls()["embedding_layer_norm"].items() if found.ok and impl != "reference"
    ]


def random_inputs(tokens: int, cols: int, index_dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    """Half of the tokens have id 3: a row of the table that many tokens read, beside many that none does."""
    ids = torch.randint(0, VOCABULARY, (tokens,)).where(torch.rand(tokens) < 0.5, 3)
    return {
        "input_ids": ids.to(index_dtype),
        "token_type_ids": torch.randint(0, TYPES, (tokens,)).to(index_dtype),
        "position_ids": torch.arange(tokens).remainder(POSITIONS).to(index_dtype),
        "word": torch.randn(VOCABULARY, cols),
        "token_type": torch.randn(TYPES, cols),
        "position": torch.randn(POSITIONS, cols),
        "weight": 1 + 0.5 * torch.randn(cols),
        "bias": torch.randn(cols),
    }


def functions(
    impl: str, dropout_p: float = 0.0, eps: float = 1e-12, padding_idx: int | None = None
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    state = RNG_STATE if dropout_p else None

    def ours(**inputs: Tensor) -> Tensor:
        return embedding_layer_norm(
            **inputs, dropout_p=dropout_p, eps=eps, padding_idx=padding_idx, rng_state=state, impl=impl
        )

    def reference(**inputs: Tensor) -> Tensor:
        return embedding_layer_norm_reference(
            **inputs,
            dropout_p=dropout_p,
            eps=eps,
            padding_idx=padding_idx,
            rng_state=state,
            out_dtype=inputs["word"].dtype,
        )

    return ours, reference


def with_gradients(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}


def gradients(out: Tensor, inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    names = [name for name, x in inputs.items() if x.requires_grad]
    return dict(zip(names, torch.autograd.grad(out, [inputs[name] for name in names], dout), strict=True))


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["keep all", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_matches_reference(
    impl: str, dropout_p: float, dtype: torch.dtype, tokens: int, cols: int, poisoned_empty: None
) -> None:
    ours, reference = functions(impl, dropout_p)
    assert_three_way(three_way(ours, reference, random_inputs(tokens, cols), dtype, (torch.randn(tokens, cols),)))


@pytest.mark.parametrize("impl", native_impls())
def test_float32_parameters_with_bfloat16_tables(impl: str) -> None:
    ours, reference = functions(impl, 0.1)
    comparisons = three_way(
        ours,
        reference,
        random_inputs(35, 200),
        torch.bfloat16,
        (torch.randn(35, 200),),
        parameter_dtype=torch.float32,
        parameters=("weight", "bias"),
    )
    assert_three_way(comparisons)


@pytest.mark.parametrize("impl", native_impls())
def test_int32_ids_give_the_same_bits(impl: str) -> None:
    inputs = random_inputs(50, 40)
    narrow = {name: x if x.is_floating_point() else x.int() for name, x in inputs.items()}
    ours, _ = functions(impl)
    wide_leaves, narrow_leaves = with_gradients(inputs), with_gradients(narrow)
    outs, dout = (ours(**wide_leaves), ours(**narrow_leaves)), torch.randn(50, 40)
    assert torch.equal(*outs)
    wanted, found = gradients(outs[0], wide_leaves, dout), gradients(outs[1], narrow_leaves, dout)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_padding_row_gets_no_gradient_and_the_others_keep_theirs(impl: str) -> None:
    inputs = random_inputs(200, 24)
    grads = []
    for padding_idx in (None, 3):
        leaves = with_gradients(inputs)
        out = functions(impl, padding_idx=padding_idx)[0](**leaves)
        grads.append(gradients(out, leaves, torch.ones(200, 24).tril()))
    plain, padded = grads
    assert plain["word"][3].abs().max() > 0
    assert (padded["word"][3] == 0).all()
    plain["word"][3] = 0
    assert all(torch.equal(plain[name], padded[name]) for name in TABLES_AND_PARAMETERS)


@pytest.mark.parametrize("impl", native_impls())
def test_rows_that_no_token_reads_get_zero(impl: str, poisoned_empty: None) -> None:
    leaves = with_gradients(random_inputs(20, 24))
    grads = gradients(functions(impl)[0](**leaves), leaves, torch.randn(20, 24))
    unread = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, leaves["input_ids"], False)
    assert unread.any()
    assert (grads["word"][unread] == 0).all()
    assert (grads["position"][20:] == 0).all()


@pytest.mark.parametrize("impl", native_impls())
def test_sums_of_many_bfloat16_rows_are_made_in_float32(impl: str) -> None:
    """In bfloat16 a sum of equal terms stops growing after 256 of them."""
    inputs = random_inputs(3000, 16)
    inputs["token_type_ids"].zero_()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    leaves = with_gradients(inputs)
    dout = (torch.rand(3000, 16) * torch.arange(16)).bfloat16()
    found = gradients(functions(impl)[0](**leaves), leaves, dout)
    exact = with_gradients({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    truth = gradients(functions("reference")[1](**exact), exact, dout.double())
    for name in TABLES_AND_PARAMETERS:
        scale = truth[name].abs().max()
        assert (found[name] - truth[name]).abs().max() <= torch.finfo(torch.bfloat16).eps * scale, name


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_drops_exactly_the_elements_of_the_definition(impl: str, dropout_p: float) -> None:
    inputs = random_inputs(41, 389)
    inputs["bias"] += 100.0  # nothing is zero by itself
    out = functions(impl, dropout_p)[0](**inputs)
    multiplier = dropout_multiplier(RNG_STATE, dropout_p, 1, 41, 389)[0].float()
    assert torch.equal(out == 0, multiplier == 0)
    assert torch.equal(out, functions(impl)[0](**inputs) * multiplier)


@pytest.mark.parametrize("impl", native_impls())
def test_constant_rows_give_the_bias(impl: str) -> None:
    inputs = with_gradients(random_inputs(6, 771))
    with torch.no_grad():
        for name, value in (("word", 12345.678), ("token_type", 0.0), ("position", 0.0)):
            inputs[name].fill_(value)
    out = functions(impl)[0](**inputs)
    assert torch.equal(out, inputs["bias"].expand(6, 771))
    assert all(x.isfinite().all() for x in gradients(out, inputs, torch.randn(6, 771)).values())


@pytest.mark.parametrize("impl", native_impls())
def test_rows_far_from_zero(impl: str) -> None:
    """E[x^2] - E[x]^2 would lose every digit here. The values are exact, so the input's rounding plays no part."""
    inputs = random_inputs(21, 768)
    for name in ("word", "token_type", "position"):
        inputs[name] = (inputs[name] * 64).round() / 64
    inputs["word"] += 1e4
    ours, reference = functions(impl)
    assert_three_way(three_way(ours, reference, inputs, torch.float32, (torch.randn(21, 768),)))


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_again_and_with_other_thread_counts(impl: str, dtype: torch.dtype) -> None:
    inputs = random_inputs(1301, 259)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    dout = torch.randn(1301, 259).to(dtype)

    def run() -> list[Tensor]:
        leaves = with_gradients(inputs)
        out = functions(impl, 0.1)[0](**leaves)
        return [out, *gradients(out, leaves, dout).values()]

    threads = torch.get_num_threads()
    runs = [run(), run()]
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append(run())
    torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("impl", native_impls())
def test_strided_inputs(impl: str) -> None:
    dense = random_inputs(9, 20)
    strided = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in dense.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    assert torch.equal(functions(impl, 0.1)[0](**strided), functions(impl, 0.1)[0](**dense))


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_autocast_rounds_once_and_leaves_the_tables_alone(impl: str) -> None:
    inputs = with_gradients(random_inputs(25, 24))
    ours, _ = functions(impl, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(**inputs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ours(**inputs).bfloat16())
    dout = torch.randn(25, 24).bfloat16()
    found = gradients(out, inputs, dout)
    wanted = gradients(ours(**inputs), inputs, dout.float())
    for name in TABLES_AND_PARAMETERS:
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_autocast_to_a_dtype_that_no_kernel_takes() -> None:
    inputs = random_inputs(25, 24)
    for table_dtype in (torch.float32, torch.bfloat16):
        cast = {name: x.to(table_dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.autocast("cpu", torch.float16):
            out = embedding_layer_norm(**cast)
        assert out.dtype == torch.float16
        assert torch.equal(out, embedding_layer_norm(**cast, impl="reference").half()) == (
            table_dtype == torch.float32 or not native_impls()
        )
        assert torch.allclose(out.float(), embedding_layer_norm(**inputs), atol=0.15)


@pytest.mark.parametrize("impl", native_impls())
def test_opcheck(impl: str) -> None:
    inputs = with_gradients(random_inputs(5, 24))
    for dropout_p, padding_idx, state, out_dtype in (
        (0.25, 3, RNG_STATE, torch.float32),
        (0.0, None, None, torch.bfloat16),
    ):
        torch.library.opcheck(
            torch.ops.bert_fast.embedding_layer_norm_fwd.default,
            (*inputs.values(), dropout_p, 1e-12, padding_idx, state, out_dtype),
        )
        dout, mean, rstd = torch.randn(5, 24).to(out_dtype), torch.randn(5), torch.rand(5)
        *before_bias, _ = (x.detach() for x in inputs.values())
        torch.library.opcheck(
            torch.ops.bert_fast.embedding_layer_norm_bwd.default,
            (dout, *before_bias, mean, rstd, dropout_p, padding_idx, state),
        )


def test_compiles_whole(compile_backend: str) -> None:
    inputs = with_gradients(random_inputs(5, 24))
    compiled = torch.compile(embedding_layer_norm, fullgraph=True, backend=compile_backend)
    options = {"dropout_p": 0.1, "rng_state": RNG_STATE, "padding_idx": 3}
    out, expected = compiled(**inputs, **options), embedding_layer_norm(**inputs, **options)
    assert torch.equal(out, expected)
    dout = torch.randn(5, 24)
    found, wanted = gradients(out, inputs, dout), gradients(expected, inputs, dout)
    assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


def test_runs_in_float64() -> None:
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in random_inputs(3, 12).items()}
    assert torch.equal(embedding_layer_norm(**inputs), functions("reference")[1](**inputs))


def test_bad_input_is_named() -> None:
    inputs = random_inputs(5, 24)

    def call(**changed: object) -> Tensor:
        return embedding_layer_norm(**(inputs | changed))  # type: ignore[arg-type]

    far = inputs["input_ids"].index_fill(0, torch.tensor([2]), VOCABULARY)
    with pytest.raises(ValueError, match=r"input_ids has values .* to 97; expected 0 to 96 \(word has 97 rows\)"):
        call(input_ids=far)
    with pytest.raises(ValueError, match=r"position_ids has values from -1 to .*expected 0 to 52 \(position has 53"):
        call(position_ids=inputs["position_ids"] - 1)
    with pytest.raises(ValueError, match=r"token_type_ids has values from 2 to 2; expected 0 to 1"):
        call(token_type_ids=torch.full((5,), 2))
    with pytest.raises(TypeError, match=r"input_ids is torch\.float32; expected torch\.int64 or torch\.int32"):
        call(input_ids=far.float())
    with pytest.raises(ValueError, match=r"token_type_ids has shape \(4,\); expected \(5,\)"):
        call(token_type_ids=inputs["token_type_ids"][1:])
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 5\); expected \(T,\)"):
        call(input_ids=inputs["input_ids"][None])
    with pytest.raises(ValueError, match=r"position has shape \(53, 23\); expected \(rows, 24\)"):
        call(position=inputs["position"][:, 1:])
    with pytest.raises(TypeError, match=r"token_type is torch\.bfloat16; expected torch\.float32"):
        call(token_type=inputs["token_type"].bfloat16())
    with pytest.raises(ValueError, match=r"bias has shape \(23,\); expected \(24,\)"):
        call(bias=inputs["bias"][1:])
    with pytest.raises(ValueError, match=r"weight is on meta; expected cpu"):
        call(weight=inputs["weight"].to("meta"))
    with pytest.raises(ValueError, match=r"padding_idx is 97; expected None or a row of word, 0 to 96"):
        call(padding_idx=97)
    with pytest.raises(ValueError, match=r"dropout_p is -0\.1; expected 0 or a probability"):
        call(dropout_p=-0.1)
    with pytest.raises(ValueError, match=r"eps is -1\.0; expected a positive number"):
        call(eps=-1.0)
    with pytest.raises(ImplUnavailableError, match=r"impl='cuda' not built yet.*Available here: reference"):
        call(impl="cuda")


@pytest.mark.parametrize("impl", native_impls())
def test_operators_check_for_themselves(impl: str) -> None:
    """What the door would refuse can't make a kernel read out of bounds either."""
    inputs = random_inputs(5, 24)

    def fwd(**changed: object) -> None:
        torch.ops.bert_fast.embedding_layer_norm_fwd(
            *(inputs | changed).values(), 0.0, 1e-12, None, None, torch.float32
        )

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
    with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16; the input is torch\.float64"):
        embedding_layer_norm(**{n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}, impl=impl)
