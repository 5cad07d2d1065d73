"""masked_lm_loss: every implementation against the reference, forward and backward, and against transformers' head."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.kernels import ImplUnavailableError, available_impls, masked_lm_loss
from bert_fast.kernels.masked_lm_loss import native
from bert_fast.kernels.masked_lm_loss.reference import masked_lm_loss_reference
from bert_fast.testing import assert_three_way, three_way

# Hidden sizes of one column, between vector widths, and a real one (not 2 to 8: LayerNorm over so few columns amplifies
# rounding so much that which side is nearer to the truth is chance). Vocabularies of one column, less than a vector,
# a few less and more than a block of the kernel (1024), and BERT's own.
SHAPES = [(1, 1, 1), (5, 12, 7), (40, 32, 1001), (33, 24, 1027), (64, 128, 30522)]
DTYPES = [torch.float32, torch.bfloat16]
PARAMETERS = ("dense_weight", "dense_bias", "norm_weight", "norm_bias", "decoder_weight", "decoder_bias")
IGNORE = -100


def native_impls() -> list[str]:
    return [impl for impl, found in available_impls()["masked_lm_loss"].items() if found.ok and impl != "reference"]


def make_inputs(rows: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    """Random inputs whose logits spread by a few units, so that the softmax is neither flat nor one-hot."""
    return {
        "hidden": torch.randn(rows, width),
        "dense_weight": torch.randn(width, width) / width**0.5,
        "dense_bias": 0.1 * torch.randn(width),
        "norm_weight": 1 + 0.1 * torch.randn(width),
        "norm_bias": 0.1 * torch.randn(width),
        "decoder_weight": 2 * torch.randn(vocabulary, width) / width**0.5,
        "decoder_bias": 0.5 * torch.randn(vocabulary),
    }


def make_labels(rows: int, vocabulary: int, masked: float = 0.4) -> Tensor:
    return torch.randint(0, vocabulary, (rows,)).where(torch.rand(rows) < masked, torch.tensor(IGNORE))


def compare(inputs: dict[str, Tensor], labels: Tensor, dtype: torch.dtype, impl: str) -> None:
    def ours(**tensors: Tensor) -> Tensor:
        return masked_lm_loss(tensors["hidden"], labels, *(tensors[name] for name in PARAMETERS), impl=impl).loss

    def reference(**tensors: Tensor) -> Tensor:
        parameters = (tensors[name] for name in PARAMETERS)
        return masked_lm_loss_reference(tensors["hidden"], labels, *parameters, 1e-12, IGNORE)[0]

    comparisons = three_way(ours, reference, inputs, dtype, (torch.tensor(1.5),))
    # The loss is one float32 number out of `dtype` logits, which eager PyTorch may hit by luck: the floor is that
    # of a mean over `count` rows, each off by one unit in the last place of `dtype`, independently.
    count = max(1, int((labels != IGNORE).sum()))
    loss = float(ours(**{name: x.to(dtype) for name, x in inputs.items()}))
    floor = torch.finfo(dtype).eps * loss / count**0.5
    assert_three_way([c._replace(bound=c.bound + floor) if c.name == "out" else c for c in comparisons])


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), SHAPES)
def test_matches_reference(
    impl: str, dtype: torch.dtype, rows: int, width: int, vocabulary: int, poisoned_empty: None
) -> None:
    labels = make_labels(rows, vocabulary)
    labels[0] = vocabulary - 1
    compare(make_inputs(rows, width, vocabulary), labels, dtype, impl)


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["all", "one", "none"])
def test_how_many_rows_have_a_label(impl: str, dtype: torch.dtype, masked: str, poisoned_empty: None) -> None:
    labels = make_labels(20, 101, masked=1.0 if masked == "all" else 0.0)
    if masked == "one":
        labels[13] = 7
    compare(make_inputs(20, 16, 101), labels, dtype, impl)


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("gemm", DTYPES, ids=str)
def test_many_chunks_and_both_product_dtypes(
    impl: str, gemm: torch.dtype, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None
) -> None:
    monkeypatch.setattr(native, "CHUNK_BYTES", 7 * 1001 * gemm.itemsize)
    monkeypatch.setitem(native.GEMM_DTYPE, torch.bfloat16, gemm)
    compare(make_inputs(50, 32, 1001), make_labels(50, 1001, masked=0.9), torch.bfloat16, impl)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
@pytest.mark.parametrize("rows", [0, 6])
def test_without_a_label_loss_and_gradients_are_zero(impl: str, rows: int) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(rows, 8, 31).values()]
    found = masked_lm_loss(leaves[0], torch.full((rows,), IGNORE), *leaves[1:], impl=impl)
    assert (found.loss.item(), found.correct.item(), found.count.item()) == (0.0, 0, 0)
    for gradient, leaf in zip(torch.autograd.grad(found.loss, leaves), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_counts_hits_and_takes_the_first_of_equal_logits(impl: str) -> None:
    """With a decoder of zeros the logits are the bias: 3 is the largest, at columns 2 and 5."""
    inputs = make_inputs(6, 8, 11)
    inputs["decoder_weight"].zero_()
    inputs["decoder_bias"].zero_()[[2, 5]] = 3.0
    labels = torch.tensor([2, 5, IGNORE, 2, 10, 0])
    found = masked_lm_loss(inputs["hidden"], labels, *(inputs[name] for name in PARAMETERS), impl=impl)
    assert (found.correct.item(), found.count.item()) == (2, 5)
    logsumexp = inputs["decoder_bias"].double().logsumexp(0)
    assert found.loss.item() == pytest.approx(float(logsumexp - 9 / 5), rel=1e-6)


@pytest.mark.parametrize("impl", native_impls())
def test_hits_equal_the_reference(impl: str) -> None:
    inputs = make_inputs(300, 32, 13)
    parameters = [inputs[name] for name in PARAMETERS]
    labels = make_labels(300, 13)
    found = masked_lm_loss(inputs["hidden"], labels, *parameters, impl=impl)
    expected = masked_lm_loss(inputs["hidden"].double(), labels, *(x.double() for x in parameters), impl="reference")
    assert (found.correct, found.count) == (expected.correct, expected.count)
    assert 0 < found.correct < found.count


@pytest.mark.parametrize("impl", native_impls())
def test_ignore_index_may_be_a_token(impl: str) -> None:
    """Zero as the label that takes no part, as older data sets have it."""
    inputs = make_inputs(9, 8, 5)
    parameters = [inputs[name] for name in PARAMETERS]
    labels = torch.tensor([0, 1, 2, 0, 4, 0, 0, 3, 0])
    found = masked_lm_loss(inputs["hidden"], labels, *parameters, ignore_index=0, impl=impl)
    other = labels.where(labels != 0, torch.tensor(IGNORE))
    expected = masked_lm_loss(inputs["hidden"], other, *parameters, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found.count == 4


@pytest.mark.parametrize("impl", native_impls())
def test_extreme_logits_stay_finite_and_infinite_ones_show(impl: str) -> None:
    """Logits of +-1e4 overflow an exponential that is not shifted by the maximum; a NaN must reach the loss."""
    inputs = make_inputs(4, 8, 50)
    inputs["decoder_bias"][3], inputs["decoder_bias"][4] = 1e4, -1e4
    leaves = [x.requires_grad_() for x in inputs.values()]
    labels = torch.tensor([3, 4, 3, IGNORE])
    loss = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    truth = masked_lm_loss(leaves[0].double(), labels, *(x.double() for x in leaves[1:]), impl="reference").loss
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, leaves))
    with torch.no_grad():
        leaves[-1][7] = float("nan")
    assert masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss.isnan()


@pytest.mark.parametrize("impl", native_impls())
def test_tied_decoder_gets_both_gradients(impl: str) -> None:
    """The word table gives the hidden states and decodes them: its gradient is the sum of the two."""
    inputs = make_inputs(12, 16, 101)
    ids, labels = torch.randint(0, 101, (12,)), make_labels(12, 101, masked=0.8)

    def gradients(dtype: torch.dtype, impl: str) -> Tensor:
        parameters = [inputs[name].to(dtype) for name in PARAMETERS]
        table = parameters[4] = parameters[4].requires_grad_()
        return torch.autograd.grad(masked_lm_loss(F.embedding(ids, table), labels, *parameters, impl=impl).loss, table)[
            0
        ]

    truth = gradients(torch.float64, "reference")
    assert torch.allclose(gradients(torch.float32, impl).double(), truth, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", native_impls())
def test_same_bits_again_and_with_other_thread_counts(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CHUNK_BYTES", 1 << 20)
    leaves = [x.requires_grad_() for x in make_inputs(700, 96, 2003).values()]
    labels = make_labels(700, 2003)

    def run() -> list[Tensor]:
        found = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl)
        return [*found, *torch.autograd.grad(found.loss, leaves)]

    threads = torch.get_num_threads()
    first, again = run(), run()
    torch.set_num_threads(1 if threads > 1 else 2)
    other = run()
    torch.set_num_threads(threads)
    names = ("loss", "correct", "count", "hidden", *PARAMETERS)
    for name, a, b, c in zip(names, first, again, other, strict=True):
        assert torch.equal(a, b), f"{name} differs from run to run"
        assert torch.equal(a, c), f"{name} depends on the number of threads"


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


@pytest.mark.parametrize("impl", native_impls())
def test_memory_does_not_grow_with_rows_times_vocabulary(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 20000 x 15001 the logits would take 1.2 GB; no tensor may be larger than a chunk or one input's gradient.

    The kernel is called as the dispatcher would, so that the mode sees the operators inside it.
    """
    rows, width, vocabulary = 20000, 8, 15001
    monkeypatch.setattr(native, "CHUNK_BYTES", 4 << 20)
    inputs = make_inputs(rows, width, vocabulary)
    labels = make_labels(rows, vocabulary, masked=0.1)
    settings = (*(inputs[name] for name in PARAMETERS), 1e-12, IGNORE, True)
    with LargestTensor() as seen:
        native._fwd(inputs["hidden"], labels, *settings)
    assert seen.elements <= max((4 << 20) // 4, rows * width, vocabulary * width)


@pytest.mark.parametrize("impl", native_impls())
def test_resident_memory_stays_below_the_logits(impl: str) -> None:
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


@pytest.mark.parametrize("impl", native_impls())
def test_autocast_keeps_parameters_and_their_gradients_in_float32(impl: str) -> None:
    inputs = make_inputs(30, 32, 301)
    labels = make_labels(30, 301)

    def run(impl: str, cast: torch.dtype | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        with torch.autocast("cpu", cast, enabled=cast is not None):
            loss = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth = run("reference", None)
    for ours, eager, exact in zip(run(impl, torch.bfloat16), run("reference", torch.bfloat16), truth, strict=True):
        assert ours.dtype == torch.float32
        bound = 2 * (eager - exact).abs().max() + 2e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= bound


@pytest.mark.parametrize("impl", native_impls())
def test_backward_twice_and_without_grad(impl: str) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(9, 8, 31).values()]
    labels = make_labels(9, 31, masked=1.0)
    loss = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3 * loss, leaves)
    assert all(torch.allclose(3 * a, b, rtol=1e-6) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        quiet = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl).loss
    assert torch.equal(quiet, loss.detach())
    assert not quiet.requires_grad


@pytest.mark.parametrize("impl", native_impls())
def test_opcheck(impl: str) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(9, 8, 31).values()]
    labels = make_labels(9, 31)
    quiet = [x.detach() for x in leaves]
    fwd = torch.ops.bert_fast.masked_lm_loss_fwd.default
    torch.library.opcheck(fwd, (leaves[0], labels, *leaves[1:], 1e-12, IGNORE, True))
    torch.library.opcheck(fwd, (quiet[0], labels, *quiet[1:], 1e-12, IGNORE, False))
    torch.library.opcheck(torch.ops.bert_fast.masked_lm_loss_bwd.default, (torch.tensor(2.0), quiet))
    rows = (torch.randn(4, 31), torch.tensor([0, 30, 7, 7]), torch.randn(31), torch.zeros(31), 0.25, True)
    torch.library.opcheck(torch.ops.bert_fast.masked_lm_loss_rows.default, rows)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_compiles_whole(impl: str) -> None:
    leaves = [x.requires_grad_() for x in make_inputs(9, 8, 31).values()]
    labels = make_labels(9, 31)
    backend = "aot_eager" if impl == "reference" else "inductor"  # inductor compiles half a minute on the reference
    found = torch.compile(masked_lm_loss, fullgraph=True, backend=backend)(leaves[0], labels, *leaves[1:], impl=impl)
    expected = masked_lm_loss(leaves[0], labels, *leaves[1:], impl=impl)
    assert (found.correct, found.count) == (expected.correct, expected.count)
    assert torch.allclose(found.loss, expected.loss, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found.loss, leaves), torch.autograd.grad(expected.loss, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *native_impls()])
def test_equals_the_head_of_transformers(impl: str) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertOnlyMLMHead

    config = BertConfig(hidden_size=32, vocab_size=997, num_attention_heads=2, intermediate_size=64)
    head = BertOnlyMLMHead(config).predictions
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, labels = torch.randn(40, 32, requires_grad=True), make_labels(40, 997)
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
    assert torch.allclose(logits, head(hidden) - head.decoder.bias + head.bias, atol=1e-5)
    theirs = F.cross_entropy(logits, labels)
    assert torch.allclose(ours.loss, theirs, rtol=1e-5)
    leaves = (hidden, *parameters)
    for a, b in zip(torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)


def test_bad_input_is_named() -> None:
    inputs = make_inputs(4, 8, 31)
    hidden, parameters = inputs["hidden"], {name: inputs[name] for name in PARAMETERS}
    labels = torch.tensor([0, 30, IGNORE, 4])

    def call(hidden: Tensor = hidden, labels: Tensor = labels, impl: str = "auto", **other: Tensor) -> None:
        masked_lm_loss(hidden, labels, **{**parameters, **other}, impl=impl)

    call()
    with pytest.raises(
        ValueError, match=r"labels has 2 values outside the vocabulary \(from -1 to 31\); expected 0 to 30"
    ):
        call(labels=torch.tensor([31, -1, IGNORE, 4]))
    with pytest.raises(TypeError, match=r"labels is torch\.int32; expected torch\.int64"):
        call(labels=labels.int())
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); expected \(4,\)"):
        call(labels=labels[:3])
    with pytest.raises(ValueError, match=r"decoder_weight has shape \(31, 7\); expected \(V, 8\)"):
        call(decoder_weight=parameters["decoder_weight"][:, :7])
    with pytest.raises(ValueError, match=r"decoder_bias has shape \(30,\); expected \(31,\)"):
        call(decoder_bias=parameters["decoder_bias"][:30])
    with pytest.raises(ValueError, match=r"dense_weight has shape \(7, 8\); expected \(8, 8\)"):
        call(dense_weight=parameters["dense_weight"][:7])
    with pytest.raises(ValueError, match=r"norm_bias has shape \(7,\); expected \(8,\)"):
        call(norm_bias=parameters["norm_bias"][:7])
    with pytest.raises(TypeError, match=r"hidden is torch\.int64; expected a floating-point tensor"):
        call(hidden=hidden.long())
    with pytest.raises(ImplUnavailableError, match="impl='cuda' not built yet"):
        call(impl="cuda")


@pytest.mark.parametrize("impl", native_impls())
def test_compiled_kernel_checks_labels_itself(impl: str) -> None:
    """Under torch.compile the door does not read values: the kernel must, before it indexes with them."""
    inputs = make_inputs(4, 8, 31)
    parameters = [inputs[name] for name in PARAMETERS]
    settings = (1e-12, IGNORE, False)
    for wrong in (31, -1, 2**40):
        with pytest.raises(RuntimeError, match=f"labels has the value {wrong}.*expected 0 to 30"):
            torch.ops.bert_fast.masked_lm_loss_fwd(
                inputs["hidden"], torch.tensor([1, IGNORE, wrong, 2]), *parameters, *settings
            )
