"""masked_lm_loss: every implementation against the reference, forward and backward, and against transformers' head."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import available_impls, masked_lm_loss
from bert_fast.kernels._common.triton_launch import recording
from bert_fast.kernels.masked_lm_loss import cpu_backends
from bert_fast.kernels.masked_lm_loss.cases import FLOAT32_ULPS
from bert_fast.kernels.masked_lm_loss.reference import masked_lm_loss_reference
from bert_fast.testing import assert_three_way, operators, targets, three_way

# Hidden sizes of one column, between vector widths, and a real one (not 2 to 8: LayerNorm over so few columns amplifies
# rounding so much that which side is nearer to the truth is chance). Vocabularies of one column, less than a vector,
# a few less and more than a block of the kernel (1024), and BERT's own.
SHAPES = [(1, 1, 1), (5, 12, 7), (40, 32, 1001), (33, 24, 1027), (64, 128, 30522)]
# One column, row and word; one tile with tails on every side; more rows than a tile (128), more columns than a step of
# its sum (64) and more words than a tile.
INTERPRETED_SHAPES = [(1, 1, 1), (5, 12, 7), (129, 72, 130)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARAMETERS = ("dense_weight", "dense_bias", "norm_weight", "norm_bias", "decoder_weight", "decoder_bias")
IGNORE = -100
TARGETS = targets("masked_lm_loss")
WITH_REFERENCE = [("reference", "cpu"), *TARGETS]
TRITON = [target for target in TARGETS if target[0] == "triton"]
TRITON_DTYPES = [target for target in targets("masked_lm_loss", dtypes=DTYPES) if target[0] == "triton"]
CPU = [target for target in TARGETS if target[0] == "cpu"]


def make_inputs(rows: int, width: int, vocabulary: int, device: str = "cpu") -> dict[str, Tensor]:
    """Random inputs whose logits spread by a few units, so that the softmax is neither flat nor one-hot."""
    inputs = {
        "hidden": torch.randn(rows, width),
        "dense_weight": torch.randn(width, width) / width**0.5,
        "dense_bias": 0.1 * torch.randn(width),
        "norm_weight": 1 + 0.1 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "decoder_weight": 2 * torch.randn(vocabulary, width) / width**0.5,
        "decoder_bias": 0.5 * torch.randn(vocabulary),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def make_labels(rows: int, vocabulary: int, masked: float = 0.4, device: str = "cpu") -> Tensor:
    labels = torch.randint(0, vocabulary, (rows,)).where(torch.rand(rows) < masked, torch.tensor(IGNORE))
    return labels.to(device)


def compare(
    inputs: dict[str, Tensor],
    labels: Tensor,
    dtype: torch.dtype,
    impl: str,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    def ours(**tensors: Tensor) -> Tensor:
        parameters = (tensors[name] for name in PARAMETERS)
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss, "impl": impl}
        return masked_lm_loss(tensors["hidden"], labels, *parameters, **options).loss

    def reference(**tensors: Tensor) -> Tensor:
        parameters = (tensors[name] for name in PARAMETERS)
        settings = (1e-12, IGNORE, label_smoothing, z_loss)
        return masked_lm_loss_reference(tensors["hidden"], labels, *parameters, *settings)[0]

    dout = torch.tensor(1.5, device=labels.device)
    comparisons = three_way(
        ours, reference, inputs, dtype, (dout,), floor_ulps=FLOAT32_ULPS if dtype == torch.float32 else 1.0
    )
    # The loss is one float32 number out of `dtype` logits, which eager PyTorch may hit by luck: the floor is that
    # of a mean over `count` rows, each off by one unit in the last place of `dtype`, independently.
    count = max(1, int((labels != IGNORE).sum()))
    loss = float(reference(**{name: x.double() for name, x in inputs.items()}))
    floor = torch.finfo(dtype).eps * loss / count**0.5
    assert_three_way([c._replace(bound=c.bound + floor) if c.name == "out" else c for c in comparisons])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes the chunks of an implementation small: (impl, bytes of a row's logits) -> 7 rows, or 8 in Triton."""

    def shrink(impl: str, row_bytes: int) -> None:
        monkeypatch.setattr(cpu_backends, "CHUNK_BYTES", 7 * row_bytes)
        if impl == "triton":
            from bert_fast.kernels.masked_lm_loss.triton import operators as triton_kernels

            monkeypatch.setattr(triton_kernels, "CHUNK_BYTES", 0)
            monkeypatch.setattr(triton_kernels, "CHUNK_ROWS", 8)

    return shrink


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "width", "vocabulary"),
    targets("masked_lm_loss", SHAPES, interpreted=INTERPRETED_SHAPES, dtypes=DTYPES),
    ids=str,
)
def test_matches_reference(
    impl: str, device: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int, poisoned_empty: None
) -> None:
    labels = make_labels(rows, vocabulary, 0.4 if rows < 100 else 1.0, device)
    labels[0] = vocabulary - 1
    compare(make_inputs(rows, width, vocabulary, device), labels, dtype, impl)


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_blocks_of_the_scan_and_of_the_softmax(impl: str, device: str, poisoned_empty: None) -> None:
    """Labels on both sides of the scan's blocks of 1024 rows, and words on both sides of the softmax's 2048."""
    labels = torch.full((2050,), IGNORE, device=device)
    labels[[0, 1, 1023, 1024, 1500, 2049]] = torch.tensor([2051, 0, 2047, 2048, 7, 2049], device=device)
    compare(make_inputs(2050, 12, 2052, device), labels, torch.float32, impl, 0.1, 0.01)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 in bands of 2, so that few rows and columns make many of them."""
    if available_impls()["masked_lm_loss"]["triton"].ok:
        from bert_fast.kernels.masked_lm_loss.triton import gemm as triton_gemm

        for tile in (triton_gemm.WIDE, triton_gemm.NARROW, triton_gemm.EXACT):
            for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
                monkeypatch.setitem(tile, name, 16)
            monkeypatch.setitem(tile, "num_warps", 1)
        monkeypatch.setattr(triton_gemm, "BAND", 2)


@pytest.mark.parametrize(("impl", "device", "dtype"), [t for t in TRITON_DTYPES if t[2] != torch.float16], ids=str)
def test_many_tiles_in_several_bands(
    impl: str, device: str, dtype: torch.dtype, small_tiles: None, poisoned_empty: None
) -> None:
    """49 of 60 rows: 4 tiles down in 2 bands, 3 across and 3 steps at E 40, 4 across and 4 steps at V 50."""
    labels = make_labels(60, 50, 1.0, device)
    labels[torch.randperm(60, device=device)[:11]] = IGNORE
    compare(make_inputs(60, 40, 50, device), labels, dtype, impl)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.3, 0.001)])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "vocabulary"),
    targets("masked_lm_loss", [(40, 1027)], interpreted=[(7, 101)], dtypes=DTYPES),
    ids=str,
)
def test_label_smoothing_and_z_loss(
    impl: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    vocabulary: int,
    label_smoothing: float,
    z_loss: float,
    poisoned_empty: None,
) -> None:
    labels = make_labels(rows, vocabulary, 0.7, device)
    compare(make_inputs(rows, 16, vocabulary, device), labels, dtype, impl, label_smoothing, z_loss)


@pytest.mark.parametrize(("impl", "device"), WITH_REFERENCE)
def test_label_smoothing_and_z_loss_by_their_formulas(impl: str, device: str) -> None:
    """With a decoder of zeros the logits are the bias, and the loss can be written down."""
    inputs = make_inputs(6, 8, 11, device)
    inputs["decoder_weight"].zero_()
    labels, smoothing, z_loss = torch.tensor([2, 5, IGNORE, 2, 10, 0], device=device), 0.2, 0.05
    parameters = [inputs[name] for name in PARAMETERS]
    parameters[-1].requires_grad_()
    result = masked_lm_loss(
        inputs["hidden"], labels, *parameters, label_smoothing=smoothing, z_loss=z_loss, impl=impl
    ).loss
    logits = parameters[-1].detach().double()
    target = torch.full((5, 11), smoothing / 11, dtype=torch.float64, device=device)
    target[torch.arange(5), labels[labels != IGNORE]] += 1 - smoothing
    lse = logits.logsumexp(0)
    expected = (target * (lse - logits)).sum(1).mean() + z_loss * lse**2
    # float32: sums over 11 words and 5 rows; 8 eps (1.2e-7).
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    slope = logits.softmax(0) * (1 + 2 * z_loss * lse) - target.mean(0)
    # float32: softmax minus target; half an eps of terms below 0.5 is 3e-8.
    assert torch.allclose(torch.autograd.grad(result, parameters[-1])[0].double(), slope, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("masked", ["all", "one", "none"])
@pytest.mark.parametrize(("impl", "device", "dtype"), targets("masked_lm_loss", dtypes=DTYPES), ids=str)
def test_how_many_rows_have_a_label(
    impl: str, device: str, dtype: torch.dtype, masked: str, poisoned_empty: None
) -> None:
    labels = make_labels(20, 101, 1.0 if masked == "all" else 0.0, device)
    if masked == "one":
        labels[13] = 7
    compare(make_inputs(20, 16, 101, device), labels, dtype, impl)


@pytest.mark.parametrize("gemm", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("impl", "device"), CPU)
def test_many_chunks_and_both_product_dtypes(
    impl: str,
    device: str,
    gemm: torch.dtype,
    small_chunks: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    poisoned_empty: None,
) -> None:
    small_chunks(impl, 1001 * gemm.itemsize)
    monkeypatch.setitem(cpu_backends.GEMM_DTYPE, torch.bfloat16, gemm)
    compare(make_inputs(50, 32, 1001), make_labels(50, 1001, masked=0.9), torch.bfloat16, impl)


@pytest.mark.parametrize("labelled", [18, 8], ids=["the last is not full", "the last are empty"])
@pytest.mark.parametrize(("impl", "device", "dtype"), TRITON_DTYPES, ids=str)
def test_many_chunks(
    impl: str,
    device: str,
    dtype: torch.dtype,
    labelled: int,
    small_chunks: Callable[[str, int], None],
    poisoned_empty: None,
) -> None:
    """19 rows in chunks of 8, whatever the labels."""
    small_chunks(impl, 0)
    labels = torch.arange(19, device=device)
    labels[labelled:] = IGNORE
    compare(make_inputs(19, 24, 70, device), labels, dtype, impl, 0.1, 0.01)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize(("impl", "device"), WITH_REFERENCE)
def test_without_a_label_loss_and_gradients_are_zero(impl: str, device: str, rows: int, poisoned_empty: None) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(rows, 8, 31, device).values()]
    labels = torch.full((rows,), IGNORE, device=device)
    result = masked_lm_loss(leaves[0], labels, *leaves[1:], label_smoothing=0.1, z_loss=0.1, impl=impl)
    assert (result.loss.item(), result.correct.item(), result.count.item()) == (0.0, 0, 0)
    for gradient, leaf in zip(torch.autograd.grad(result.loss, leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize(("impl", "device"), WITH_REFERENCE)
def test_counts_hits_and_takes_the_first_of_equal_logits(impl: str, device: str) -> None:
    """With a decoder of zeros the logits are the bias: 3 is the largest, at columns 2 and 5."""
    inputs = make_inputs(6, 8, 11, device)
    inputs["decoder_weight"].zero_()
    inputs["decoder_bias"].zero_()[[2, 5]] = 3.0
    labels = torch.tensor([2, 5, IGNORE, 2, 10, 0], device=device)
    result = masked_lm_loss(inputs["hidden"], labels, *(inputs[name] for name in PARAMETERS), impl=impl)
    assert (result.correct.item(), result.count.item()) == (2, 5)
    logsumexp = inputs["decoder_bias"].double().logsumexp(0)
    # float32: exact logits, sums over 11 words and 5 rows; 8 eps (1.2e-7).
    assert result.loss.item() == pytest.approx(float(logsumexp - 9 / 5), rel=1e-6)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_hits_equal_the_reference(impl: str, device: str) -> None:
    inputs = make_inputs(300, 32, 13, device)
    parameters = [inputs[name] for name in PARAMETERS]
    labels = make_labels(300, 13, device=device)
    result = masked_lm_loss(inputs["hidden"], labels, *parameters, impl=impl)
    expected = masked_lm_loss(inputs["hidden"].double(), labels, *(x.double() for x in parameters), impl="reference")
    assert (result.correct, result.count) == (expected.correct, expected.count)
    assert 0 < result.correct < result.count


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_ignore_index_may_be_a_token(impl: str, device: str) -> None:
    """Label 0 is the ignored one, as in older data sets."""
    inputs = make_inputs(9, 8, 5, device)
    parameters = [inputs[name] for name in PARAMETERS]
    labels = torch.tensor([0, 1, 2, 0, 4, 0, 0, 3, 0], device=device)
    result = masked_lm_loss(inputs["hidden"], labels, *parameters, ignore_index=0, impl=impl)
    other = labels.where(labels != 0, torch.tensor(IGNORE, device=device))
    expected = masked_lm_loss(inputs["hidden"], other, *parameters, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert result.count == 4


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_extreme_logits_stay_finite_and_infinite_ones_show(impl: str, device: str) -> None:
    """Logits of +-1e4 overflow an exponential that is not shifted by the maximum; one of minus infinity excludes its
    word; a NaN reaches the loss."""
    inputs = make_inputs(4, 8, 50, device)
    inputs["decoder_bias"][[3, 4, 5]] = torch.tensor([1e4, -1e4, -float("inf")], device=device)
    leaves = [x.requires_grad_() for x in inputs.values()]
    labels = torch.tensor([3, 4, 3, IGNORE], device=device)
    loss = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    truth = masked_lm_loss(leaves[0].double(), labels, *(x.double() for x in leaves[1:]), impl="reference").loss
    # float32: logits of 1e4 in a mean of three rows; 8 eps (1.2e-7).
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))
    with torch.no_grad():
        leaves[-1][7] = float("nan")
    assert masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss.isnan()


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_tied_decoder_gets_both_gradients(impl: str, device: str) -> None:
    """The word embedding is also the decoder: its gradient is the sum of both."""
    inputs = make_inputs(12, 16, 101, device)
    ids, labels = torch.randint(0, 101, (12,), device=device), make_labels(12, 101, 0.8, device)

    def gradients(dtype: torch.dtype, impl: str) -> Tensor:
        parameters = [inputs[name].to(dtype) for name in PARAMETERS]
        table = parameters[4] = parameters[4].requires_grad_()
        loss = masked_lm_loss(F.embedding(ids, table), labels, *parameters, impl=impl).loss
        return torch.autograd.grad(loss, table)[0]

    truth = gradients(torch.float64, "reference")
    # float32 gradients of up to 0.4, sums of up to 101 terms: 1e-6 is 20 eps of the largest.
    assert torch.allclose(gradients(torch.float32, impl).double(), truth, atol=1e-6, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operator returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize(("impl", "device"), CPU)
def test_memory_does_not_grow_with_rows_times_vocabulary(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 20000 x 15001 the logits would take 1.2 GB; no tensor may be larger than a chunk or one input's gradient.

    The kernel is called as the dispatcher would, so that the mode sees the operators inside it.
    """
    rows, width, vocabulary = 20000, 8, 15001
    monkeypatch.setattr(cpu_backends, "CHUNK_BYTES", 4 << 20)
    inputs = make_inputs(rows, width, vocabulary)
    labels = make_labels(rows, vocabulary, masked=0.1)
    settings = (*(inputs[name] for name in PARAMETERS), 1e-12, IGNORE, 0.0, 0.0, True)
    with LargestTensor() as seen:
        cpu_backends._fwd(inputs["hidden"], labels, *settings)
    assert seen.elements <= max((4 << 20) // 4, rows * width, vocabulary * width)


def test_device_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    """The Triton launchers' tensors, recorded without running: a chunk of 16 MiB, 1.2 GB of logits."""
    state = available_impls()["masked_lm_loss"]["triton"]
    if not state.ok:
        pytest.skip(f"the Triton kernels can't run here: {state.reason}")
    from bert_fast.kernels.masked_lm_loss.triton import operators as triton_kernels

    rows, width, vocabulary, padded = 20000, 8, 15001, 15040
    inputs = {name: x.to("meta") for name, x in make_inputs(rows, width, vocabulary).items()}
    labels = make_labels(rows, vocabulary).to("meta")
    settings = (*(inputs[name] for name in PARAMETERS), 1e-12, IGNORE, 0.0, 0.0, True)
    with pytest.MonkeyPatch.context() as patch, recording(), LargestTensor() as seen:
        patch.setattr(triton_kernels, "CHUNK_BYTES", 16 << 20)
        triton_kernels.masked_lm_loss_fwd(inputs["hidden"], labels, *settings)
    assert seen.elements <= max((16 << 20) // 4, rows * width, padded * width)


@pytest.mark.parametrize(("impl", "device"), CPU)
def test_resident_memory_stays_below_the_logits(impl: str, device: str) -> None:
    """Every one of 5000 rows labelled, V 30522: the logits would take 610 MB. Measured in a fresh process."""
    program = f"""
import resource, torch
from bert_fast.kernels import masked_lm_loss
torch.set_num_threads(2)
shapes = [(5000, 4), (4, 4), (4,), (4,), (4,), (30522, 4), (30522,)]
hidden, *parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
def step(rows):
    labels = torch.full((5000,), -100)
    labels[:rows] = 5
    masked_lm_loss(hidden, labels, *parameters, impl={impl!r}).loss.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = step(10)
print(step(5000) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 << 10  # KiB; the chunk is 32 MiB, the rest are the allocator's and BLAS's buffers


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_backward_twice_and_without_grad(impl: str, device: str) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(9, 8, 31, device).values()]
    labels = make_labels(9, 31, 1.0, device)
    loss = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    # The factor 3 is one more float32 rounding, wherever it is applied: half an eps (6e-8).
    assert all(torch.allclose(3 * a, b, rtol=1e-6) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        without_grad = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    assert torch.equal(without_grad, loss.detach())
    assert not without_grad.requires_grad


@pytest.mark.parametrize(("impl", "device"), CPU)
def test_opcheck_rows(impl: str, device: str) -> None:
    labels = torch.tensor([0, 30, 7, 7])
    rows = (torch.randn(4, 31), labels, torch.randn(31), torch.zeros(31), 0.25, 0.1, 0.01, True)
    torch.library.opcheck(torch.ops.bert_fast.masked_lm_loss_rows.default, rows)
    assert not hasattr(torch.ops.bert_fast_triton, "masked_lm_loss_rows")


@pytest.mark.parametrize(("impl", "device"), WITH_REFERENCE)
def test_equals_the_head_of_transformers(impl: str, device: str) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead

    config = BertConfig(hidden_size=32, vocab_size=997, num_attention_heads=2, intermediate_size=64)
    head = BertOnlyMLMHead(config).predictions.to(device)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, labels = torch.randn(40, 32, device=device, requires_grad=True), make_labels(40, 997, device=device)
    transform = head.transform
    parameters = (
        transform.dense.weight,
        transform.dense.bias,
        transform.LayerNorm.weight,
        transform.LayerNorm.bias,
        head.decoder.weight,
        head.bias,
    )
    ours = masked_lm_loss(hidden, labels, *parameters, eps=config.layer_norm_eps, impl=impl)
    logits = F.linear(transform(hidden), head.decoder.weight, head.bias)
    # float32: the bias is exchanged in three additions to logits of up to 5, rounded by half an ulp (2.4e-7) each.
    assert torch.allclose(logits, head(hidden) - head.decoder.bias + head.bias, atol=1e-5)
    theirs = F.cross_entropy(logits, labels)
    # float32 in another order: sums over 32 columns, 997 words and about 16 rows; the error is 1e-7.
    assert torch.allclose(ours.loss, theirs, rtol=1e-5)
    leaves = (hidden, *parameters)
    for a, b in zip(torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        # float32 gradients of up to 0.4, sums of up to 997 terms: 1e-6 is 20 eps of the largest.
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("impl", "device"), CPU)
def test_compiled_kernel_checks_labels_itself(impl: str, device: str) -> None:
    """Under torch.compile the public function reads no values: the kernel must, before it indexes with them."""
    inputs = make_inputs(4, 8, 31)
    parameters = [inputs[name] for name in PARAMETERS]
    settings = (1e-12, IGNORE, 0.0, 0.0, False)
    for wrong in (31, -1, 2**40):
        with pytest.raises(RuntimeError, match=f"labels has the value {wrong}.*expected 0 to 30"):
            torch.ops.bert_fast.masked_lm_loss_fwd(
                inputs["hidden"], torch.tensor([1, IGNORE, wrong, 2]), *parameters, *settings
            )


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_labels_outside_the_vocabulary_take_no_part(impl: str, device: str) -> None:
    """The public function reads no values of CUDA tensors: a wrong one must not make a kernel read elsewhere."""
    inputs = make_inputs(7, 8, 31, device)
    labels = torch.tensor([1, IGNORE, 31, -1, 2**40, 30, -(2**40)], device=device)
    valid = torch.tensor([1, *[IGNORE] * 4, 30, IGNORE], device=device)
    settings = (*(inputs[name] for name in PARAMETERS), 1e-12, IGNORE, 0.1, 0.01, True)
    *results, gradients = operators(impl).masked_lm_loss_fwd(inputs["hidden"], labels, *settings)
    *expected, exact = operators(impl).masked_lm_loss_fwd(inputs["hidden"], valid, *settings)
    assert results[2] == 2
    assert all(torch.equal(a, b) for a, b in zip([*results, *gradients], [*expected, *exact], strict=True))


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_float16_gradients_survive_until_the_loss_scale(impl: str, device: str) -> None:
    """Below float16's smallest normal number a gradient loses digits; after a GradScaler's scale it is above."""
    inputs = {name: x.half() for name, x in make_inputs(16, 24, 301, device).items()}
    inputs["decoder_weight"] *= 1e-4
    labels, scale = make_labels(16, 301, 1.0, device), 2.0**16

    def gradient(impl: str, dtype: torch.dtype) -> Tensor:
        hidden, *parameters = [x.to(dtype) for x in inputs.values()]
        loss = masked_lm_loss(hidden.requires_grad_(), labels, *parameters, impl=impl).loss
        return torch.autograd.grad(loss * scale, hidden)[0].double() / scale

    truth = gradient("reference", torch.float64)
    assert truth.abs().max() < torch.finfo(torch.float16).tiny
    assert (gradient(impl, torch.float16) - truth).abs().max() < 0.01 * truth.abs().max()
