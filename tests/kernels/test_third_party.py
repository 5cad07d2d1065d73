"""`register`: kernels of others as implementations, what they are called with, and what they may return."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast import BertConfig, BertModel
from bert_fast.kernels import (
    ImplUnavailableError,
    add_layer_norm,
    attention,
    available_impls,
    bias_gelu,
    embedding_layer_norm,
    feed_forward_int8,
    lamb_step,
    linear,
    linear_int8,
    masked_lm_loss,
    pad,
    quantize_weight,
    register,
    unpad,
    unregister,
    use_impl,
)
from bert_fast.kernels._common import cases
from bert_fast.kernels._common.dispatch import IMPLS, OPS
from bert_fast.kernels._common.third_party import load_file
from bert_fast.testing.runs import run
from bert_fast.verification import verify

ROOT = Path(__file__).resolve().parents[2]
X, BIAS = torch.randn(5, 24), torch.randn(24)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Whatever a test registers is gone afterwards."""
    yield
    for op, implementations in OPS.items():
        for name in [name for name in implementations.impls if name not in IMPLS]:
            unregister(op, name)


def gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def by_public_function(op: str) -> Any:
    """The op's public function as a kernel of others: it takes the same arguments."""
    functions: dict[str, Callable[..., Any]] = {
        "attention": attention,
        "add_layer_norm": add_layer_norm,
        "bias_gelu": bias_gelu,
        "embedding_layer_norm": embedding_layer_norm,
        "linear": linear,
        "linear_int8": linear_int8,
        "masked_lm_loss": masked_lm_loss,
    }
    if op in functions:
        return lambda **arguments: functions[op](**arguments, impl="reference")
    reference = OPS[op].impls["reference"].call()
    return reference._asdict()


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_kernel_gets_the_public_arguments_and_gives_the_same_bits(op: str) -> None:
    """Outputs and gradients of every sample, which includes dropout; and no other implementation runs."""
    register(op, "mine", by_public_function(op))
    torch.manual_seed(0)
    for sample in cases.load(op).samples():
        inputs = sample.cast(torch.float32)
        expected, results = (run(sample, impl, inputs) for impl in ("reference", "mine"))
        for name, value in expected.items():
            assert torch.equal(results[name], value), f"{sample.name}: {name}"


def test_it_is_listed_verified_and_never_chosen_by_auto() -> None:
    calls: list[str] = []

    def mine(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        calls.append(approximate)
        return gelu(x, bias, approximate=approximate)

    register("bias_gelu", "mine", mine, device="cpu", dtypes=[torch.float32])
    state = available_impls()["bias_gelu"]["mine"]
    assert state.ok
    assert not state.verified
    assert "register()" in state.reason
    bias_gelu(X, BIAS)
    assert calls == []
    with use_impl({"bias_gelu": "mine"}):
        bias_gelu(X, BIAS, approximate="tanh")
    assert calls == ["tanh"]
    results = list(verify(impls=["mine"]))
    assert [(result.op, result.dtype, result.ok) for result in results] == [("bias_gelu", "float32", True)] * 2


def test_a_wrong_kernel_fails_verification() -> None:
    register("bias_gelu", "mine", lambda x, bias, approximate: F.gelu(x + bias, approximate="tanh"))
    assert {result.case: result.ok for result in verify(impls=["mine"]) if result.dtype == "float32"} == {
        "erf": False,
        "tanh": True,
    }


def test_the_encoder_runs_on_it() -> None:
    """In inference, where the fast path calls implementations by position, and in training."""
    torch.manual_seed(0)
    model = BertModel(BertConfig.size("tiny", vocab_size=50)).eval()
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ops = ("attention", "add_layer_norm", "linear", "embedding_layer_norm", "bias_gelu")
    for op in ops:
        register(op, "mine", by_public_function(op))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with use_impl(dict.fromkeys(ops, "reference")):
                expected = model(ids, mask).last_hidden_state
            with use_impl(dict.fromkeys(ops, "mine")):
                assert torch.equal(model(ids, mask).last_hidden_state, expected)


def test_its_own_backward_is_called_with_what_forward_saved() -> None:
    def forward(x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert not torch.is_grad_enabled()
        return gelu(x, bias, approximate=approximate), (x + bias,)

    def backward(dout: Tensor, saved: tuple[Tensor, ...], *, bias: Tensor, **_: Any) -> dict[str, Tensor]:
        (u,) = saved
        leaf = u.detach().requires_grad_()
        with torch.enable_grad():
            (du,) = torch.autograd.grad(F.gelu(leaf), leaf, dout)
        return {"x": du, "bias": du.sum(0)}

    register("bias_gelu", "mine", forward, backward=backward)
    x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
    gradients = torch.autograd.grad(bias_gelu(x, bias, impl="mine").square().sum(), (x, bias))
    expected = torch.autograd.grad(gelu(x, bias).square().sum(), (x, bias))
    torch.testing.assert_close(gradients, expected)


def test_feed_forward_int8_runs_twice_through_a_kernel_of_linear_int8() -> None:
    register("linear_int8", "mine", by_public_function("linear_int8"))
    up, down = quantize_weight(torch.randn(40, 24)), quantize_weight(torch.randn(24, 40))
    results = [feed_forward_int8(X, up, torch.randn(40) * 0, down, impl=impl) for impl in ("mine", "reference")]
    assert torch.equal(*results)
    halves = [linear_int8(X.bfloat16(), up, out_dtype=torch.float32, impl=impl) for impl in ("mine", "reference")]
    assert halves[0].dtype == torch.float32
    assert torch.equal(*halves)


def test_several_functions_of_padding_and_lamb() -> None:
    for op in ("padding", "lamb"):
        register(op, "mine", by_public_function(op))
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    packed = unpad(x, mask, impl="mine")
    assert torch.equal(packed.x, x[mask.bool()])
    assert torch.equal(pad(packed.x, packed.indices, 2, 3, impl="mine"), x * mask.unsqueeze(-1))
    states = []
    for impl in ("reference", "mine"):
        tensors = [[x.clone()] for x in (torch.ones(3), torch.full((3,), 0.5), torch.zeros(3), torch.zeros(3))]
        lamb_step(*tensors, step=1, lr=0.1, impl=impl)
        states.append(tensors[0][0])
    assert torch.equal(*states)


def wrong(result: Any) -> Callable[..., Any]:
    return lambda x, bias, approximate: result


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (wrong(None), TypeError, r"bias_gelu: impl='mine' returned None; expected a tensor"),
        (wrong((X, X)), TypeError, r"returned 2 values; expected 1 tensor"),
        (wrong(X[:, 1:]), ValueError, r"returned shape \(5, 23\); expected \(5, 24\)"),
        (wrong(X.double()), TypeError, r"returned torch.float64; expected torch.float32"),
        (wrong(X.to("meta")), ValueError, r"returned a tensor on meta; expected cpu"),
    ],
)
def test_what_it_returns_is_checked(fn: Any, error: type[Exception], message: str) -> None:
    register("bias_gelu", "mine", fn)
    with pytest.raises(error, match=message):
        bias_gelu(X, BIAS, impl="mine")


@pytest.mark.parametrize(
    ("returned", "gradients", "error", "message"),
    [
        (
            lambda out: out,
            {},
            TypeError,
            r"has a backward and returned a tensor of shape .*; expected \(output, saved\)",
        ),
        (lambda out: (out, ()), [], TypeError, r"backward returned 0 values; expected \{argument: gradient\}"),
        (lambda out: (out, ()), {"y": X}, ValueError, r"a gradient of 'y'; expected those of \['x', 'bias'\]"),
        (lambda out: (out, ()), {"bias": X}, ValueError, r"shape \(5, 24\) as the gradient of bias; .* \(24,\)"),
    ],
)
def test_what_its_backward_returns_is_checked(
    returned: Any, gradients: Any, error: type[Exception], message: str
) -> None:
    register("bias_gelu", "mine", lambda **a: returned(gelu(**a)), backward=lambda *_, **__: gradients)
    x, bias = X.clone().requires_grad_(), BIAS.clone().requires_grad_()
    with pytest.raises(error, match=message):
        bias_gelu(x, bias, impl="mine").sum().backward()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("gelu", "mine", gelu), {}, ValueError, "op is 'gelu'; expected one of add_layer_norm, "),
        (("bias_gelu", "cpu", gelu), {}, ValueError, "name is 'cpu', which is the name of one of ours"),
        (("bias_gelu", "auto", gelu), {}, ValueError, "name is 'auto'"),
        (("bias_gelu", "my kernel", gelu), {}, ValueError, "name is 'my kernel'; expected an identifier"),
        (("bias_gelu", "mine", 3), {}, TypeError, "fn is of type int; expected a function"),
        (
            ("bias_gelu", "mine", lambda x: x),
            {},
            TypeError,
            r"signature \(x\) .*expected the arguments x, bias, approx",
        ),
        (("bias_gelu", "mine", gelu), {"device": "gpu"}, ValueError, "device is 'gpu'; expected a device type"),
        (("bias_gelu", "mine", gelu), {"device": "cuda:1"}, ValueError, "a device type without an index: 'cuda'"),
        (("bias_gelu", "mine", gelu), {"dtypes": ["fp32"]}, TypeError, r"dtypes is \['fp32'\]; expected torch dtypes"),
        (("bias_gelu", "mine", gelu), {"dtypes": []}, TypeError, r"dtypes is \[\]; expected torch dtypes"),
        (("bias_gelu", "mine", gelu), {"backward": 1}, TypeError, "backward is of type int"),
        (
            ("padding", "mine", gelu),
            {},
            TypeError,
            "fn is of type function; expected a mapping .*unpad_indices, gather",
        ),
        (("lamb", "mine", {"lamb_step": gelu}), {}, TypeError, "fn is lamb_step; expected a mapping"),
        (("linear_int8", "mine", lambda **_: X), {"backward": gelu}, ValueError, "linear_int8 has no gradient"),
    ],
)
def test_wrong_registrations_are_refused(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    before = {op: list(OPS[op].impls) for op in OPS}
    with pytest.raises(error, match=message):
        register(*arguments, **options)
    assert {op: list(OPS[op].impls) for op in OPS} == before


def test_a_name_is_taken_until_it_is_unregistered() -> None:
    register("bias_gelu", "mine", gelu)
    with pytest.raises(ValueError, match="'mine', which is registered already for bias_gelu"):
        register("bias_gelu", "mine", gelu)
    register("linear", "mine", by_public_function("linear"))
    unregister("bias_gelu", "mine")
    with pytest.raises(ImplUnavailableError, match="bias_gelu: impl='mine' does not exist"):
        bias_gelu(X, BIAS, impl="mine")
    with pytest.raises(ValueError, match="name is 'mine'; expected one of those registered for bias_gelu: none"):
        unregister("bias_gelu", "mine")
    with pytest.raises(ValueError, match="name is 'cpu'"):
        unregister("bias_gelu", "cpu")


def test_another_device_or_dtype_is_refused() -> None:
    register("bias_gelu", "mine", gelu, device="cuda", dtypes=(torch.float16,))
    with pytest.raises(ImplUnavailableError, match="impl='mine' runs on cuda tensors; the input is on cpu"):
        bias_gelu(X, BIAS, impl="mine")
    unregister("bias_gelu", "mine")
    register("bias_gelu", "mine", gelu, dtypes=(torch.float16,))
    with pytest.raises(ImplUnavailableError, match=r"impl='mine' takes float16; the input is torch.float32"):
        bias_gelu(X, BIAS, impl="mine")


def test_files_register_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    with pytest.raises(FileNotFoundError, match=r"kernels\.py: no such file"):
        load_file(path)
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"kernels\.py registers no kernel"):
        load_file(path)
    path.write_text(
        "from bert_fast.kernels import register\n"
        "register('bias_gelu', 'filed', lambda x, bias, approximate: x + bias)\n"
    )
    load_file(path)
    assert torch.equal(bias_gelu(X, BIAS, impl="filed"), X + BIAS)


PACKAGE = """
from bert_fast.kernels import register
def register_all():
    register("bias_gelu", "packaged", lambda x, bias, approximate: x - bias)
def broken():
    raise OSError("no library")
"""


def installed(folder: Path, name: str, function: str) -> None:
    """A package with an entry point, as an installer leaves it in a folder of the path."""
    (folder / f"{name}.py").write_text(PACKAGE)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bert_fast.kernels]\n{name} = {name}:{function}\n")


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        ("print(bias_gelu(x, b, impl='packaged').item())", {}),
        ("print(bias_gelu(x, b).item())", {"BERT_FAST_IMPL": "packaged"}),
        ("with use_impl('packaged'): print(bias_gelu(x, b).item())", {}),
        ("available_impls()['bias_gelu']['packaged']; print(bias_gelu(x, b, impl='packaged').item())", {}),
    ],
)
def test_installed_packages_register_kernels(tmp_path: Path, code: str, environment: dict[str, str]) -> None:
    """One that can't be loaded is a warning, and named where its kernel is asked for."""
    installed(tmp_path, "good_kernels", "register_all")
    installed(tmp_path, "bad_kernels", "broken")
    script = (
        "import torch\nfrom bert_fast.kernels import available_impls, bias_gelu, use_impl\n"
        f"x, b = torch.full((1, 1), 5.0), torch.ones(1)\n{code}\n"
        "try: bias_gelu(x, b, impl='other')\nexcept ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
    )
    assert done.returncode == 0, done.stderr
    value, message = done.stdout.splitlines()
    assert value == "4.0"
    assert "impl is 'other'; expected one of auto, reference, triton, cuda, cpu, packaged" in message
    assert "bad_kernels = bad_kernels:broken: OSError: no library" in message
    assert "RuntimeWarning: the entry point bad_kernels" in done.stderr
