"""Weights are read at every call; frozen ones are packed once, again after every change that torch counts."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bert_fast.kernels import linear, linear_int8, quantize_weight
from bert_fast.kernels._common import weight_cache
from bert_fast.kernels.linear import cpu_backends
from bert_fast.kernels.linear_int8 import cpu_backends as int8_backends


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float32 uses packed weights, as on AVX-512, and the cache is empty."""
    monkeypatch.setitem(cpu_backends.BACKENDS, torch.float32, cpu_backends.Backends("onednn", "onednn"))
    weight_cache.invalidate()
    yield
    weight_cache.invalidate()


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that were packed, in order."""
    weights: list[Tensor] = []
    pack = cpu_backends.pack

    def recorded(weight: Tensor) -> Tensor:
        weights.append(weight)
        return pack(weight)

    monkeypatch.setattr(cpu_backends, "pack", recorded)
    return weights


def layer() -> nn.Linear:
    """Whose weight is frozen."""
    module = nn.Linear(48, 96, bias=False)
    weight_cache.freeze_weights([module.weight])
    return module


def check(module: nn.Linear, x: Tensor) -> None:
    with torch.no_grad():
        out = linear(x, module.weight, impl="cpu")
    expected = x.to(out.dtype).double() @ module.weight.double().T
    # bfloat16 rounds outputs of up to 4 by half an ulp, 0.008; float32 sums of 48 terms, up to 26, are off by 6e-6.
    assert torch.allclose(out.double(), expected, atol=0.05 if out.dtype == torch.bfloat16 else 1e-5)


def test_packed_once_while_nothing_changes(packs: list[Tensor]) -> None:
    module = layer()
    for rows in (1, 7, 64, 7):
        check(module, torch.randn(rows, 48))
    with torch.inference_mode():
        linear(torch.randn(3, 48), module.weight, impl="cpu")
    assert len(packs) == 1


def step(module: nn.Linear) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(3, 48)).sum().backward()
    optimizer.step()


def new_data(module: nn.Linear) -> None:
    module.weight.data = torch.randn(96, 48)


def one_value(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight[5, 5] = 100.0


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "optimizer step": step,
    "load_state_dict": lambda module: module.load_state_dict({"weight": torch.randn(96, 48)}),
    "load_state_dict, assigned": lambda m: m.load_state_dict({"weight": torch.randn(96, 48)}, assign=True),
    "data = new": new_data,
    "one value": one_value,
    "to float64 and back": lambda module: module.double().float(),
    "init": lambda module: nn.init.normal_(module.weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_that_torch_counts_are_seen_in_a_frozen_weight(change: Callable[[nn.Linear], object]) -> None:
    module, x = layer(), torch.randn(5, 48)
    for _ in range(3):
        check(module, x)
        change(module)
    check(module, x)


def test_each_dtype_has_its_own_copy() -> None:
    module, x = layer(), torch.randn(5, 48)
    check(module, x)
    module.bfloat16()
    check(module, x.bfloat16())
    check(module.float(), x)


def clamp(weight: Tensor) -> None:
    weight.data.clamp_(-0.01, 0.01)


def one_column(weight: Tensor) -> None:
    weight.data[:, 7] = 3


def last_value(weight: Tensor) -> None:
    weight.data[-1, -1] = 50


def swap(weight: Tensor) -> None:
    weight.data[:2] = weight.data[:2].flip(0)


def negate(weight: Tensor) -> None:
    weight.data.neg_()


def through_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[11, 3] = 40


def through_dlpack(weight: Tensor) -> None:
    np.from_dlpack(weight.detach())[0, 0] = 40


def in_inference_mode(weight: Tensor) -> None:
    with torch.inference_mode():
        weight.data.mul_(2)


def in_another_process(weight: Tensor) -> None:
    weight.data = weight.data.share_memory_()
    process = multiprocessing.get_context("fork").Process(target=last_value, args=(weight,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


UNCOUNTED = [clamp, one_column, last_value, swap, negate, in_inference_mode, in_another_process]
IN_FLOAT32 = [through_numpy, through_dlpack]  # NumPy has no bfloat16
BACKENDS = [(torch.float32, name) for name in ("tiles", "onednn", "blas")] + [(torch.bfloat16, "tiles")]
if cpu_backends.BACKENDS[torch.bfloat16].training == "onednn":
    BACKENDS.append((torch.bfloat16, "onednn"))


def check_weights(x: Tensor, weights: list[Tensor]) -> None:
    out = linear(x, weights, impl="cpu")
    expected = x.double() @ torch.cat(weights).double().T
    eps = torch.finfo(x.dtype).eps  # of the result; sums of 48 terms of float32 are off by less than 50 units
    assert torch.allclose(
        out.double(), expected, rtol=0, atol=(50 if eps < 1e-6 else 2) * eps * float(expected.abs().max())
    )


@pytest.mark.parametrize("write", [*UNCOUNTED, *IN_FLOAT32], ids=lambda write: write.__name__)
@pytest.mark.parametrize(("dtype", "backend"), BACKENDS, ids=str)
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_every_write_is_seen(
    write: Callable[[Tensor], None],
    dtype: torch.dtype,
    backend: str,
    made_in_inference_mode: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In weights that are not frozen, one and several, with few rows and with many, which are packed in the call."""
    if write in IN_FLOAT32 and dtype != torch.float32:
        return
    monkeypatch.setitem(cpu_backends.BACKENDS, dtype, cpu_backends.Backends(backend, backend))
    with torch.inference_mode(made_in_inference_mode):
        weights = [torch.randn(96, 48, dtype=dtype), torch.randn(30, 48, dtype=dtype)]
    with torch.no_grad() if not made_in_inference_mode else torch.inference_mode():
        for rows in (3, 600):
            x = torch.randn(rows, 48).to(dtype)
            for _ in range(2):
                check_weights(x, weights[:1])
                check_weights(x, weights)
                write(weights[0])
            check_weights(x, weights[:1])
            check_weights(x, weights)


@pytest.mark.parametrize("backend", ["tiles", "onednn"])
@pytest.mark.parametrize("row", range(0, 96, 19))
def test_every_write_to_an_int8_weight_is_seen(backend: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_backends, "BACKEND", backend)
    weight, x = quantize_weight(torch.randn(96, 48), limit=64), torch.randn(5, 48)

    def check_int8() -> None:
        # The products are integers; what is rounded are scales and the result, in float32.
        torch.testing.assert_close(linear_int8(x, weight, impl="cpu"), linear_int8(x, weight, impl="reference"))

    check_int8()
    for column in (0, 17, 47):
        weight.values.data[row, column] = 50 if int(weight.values[row, column]) < 0 else -50
        check_int8()
    weight.values.data.neg_()
    check_int8()


def test_a_frozen_weight_is_packed_again_on_request(packs: list[Tensor]) -> None:
    """After a write that torch doesn't count."""
    module, x = layer(), torch.randn(5, 48)
    check(module, x)
    last_value(module.weight)
    weight_cache.freeze_weights([module.weight])
    check(module, x)
    assert len(packs) == 2
    weight_cache.unfreeze_weights([module.weight])
    assert not weight_cache._entries
    last_value(module.weight)
    check(module, x)
    assert len(packs) == 2


def test_what_frozen_is_forgotten_with_the_weight() -> None:
    module = layer()
    assert weight_cache.are_frozen((module.weight,))
    key = id(module.weight)
    del module
    gc.collect()
    assert key not in weight_cache._frozen


def test_an_entry_is_dropped_with_its_weight() -> None:
    module = layer()
    check(module, torch.randn(5, 48))
    assert len(weight_cache._entries) == 1
    del module
    gc.collect()
    assert not weight_cache._entries


def test_training_packs_nothing(packs: list[Tensor]) -> None:
    weight = torch.randn(96, 48, requires_grad=True)
    linear(torch.randn(5, 48), weight, impl="cpu")
    assert not packs
    assert not weight_cache._entries


def test_copies_and_pickles_are_cached_separately() -> None:
    module, x = layer(), torch.randn(5, 48)
    check(module, x)
    twin = copy.deepcopy(module)
    assert not weight_cache.are_frozen((twin.weight,))
    with torch.no_grad():
        twin.weight.mul_(-3)
    check(twin, x)
    check(module, x)
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 3 * module.weight.nbytes  # no packed copy inside
    file.seek(0)
    check(torch.load(file, weights_only=False), x)


def test_tied_weights_share_an_entry(packs: list[Tensor]) -> None:
    first, second, x = layer(), layer(), torch.randn(5, 48)
    second.weight = first.weight
    check(first, x)
    check(second, x)
    assert len(packs) == 1
    step(first)
    check(second, x)
    assert len(packs) == 2


def test_two_models_and_many_threads() -> None:
    modules, x = [layer() for _ in range(4)], torch.randn(5, 48)
    errors: list[BaseException] = []

    def work(module: nn.Linear) -> None:
        try:
            for _ in range(50):
                check(module, x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(module,)) for module in modules * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(weight_cache._entries) == 4


def _in_child(module: nn.Linear, x: Tensor, connection: object) -> None:
    # Without torch's own products: MKL's allocator can hang in a child of a process whose threads used it.
    torch.set_num_threads(1)
    outs = []
    with torch.no_grad():
        for _ in range(2):
            outs.append(linear(x, module.weight, impl="cpu").tolist())
            module.weight.mul_(2)
    connection.send(outs)  # type: ignore[attr-defined]


def test_a_forked_process_packs_for_itself() -> None:
    module, x = layer(), torch.randn(5, 48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads
    check(module, x)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(module, x, there), daemon=True)
    child.start()
    assert here.poll(60)
    first, doubled = map(torch.tensor, here.recv())
    child.join()
    torch.set_num_threads(threads)
    check(module, x)
    with torch.no_grad():
        assert torch.equal(first, linear(x, module.weight, impl="cpu"))
    assert torch.equal(doubled, 2 * first)


def test_subclasses_of_tensor_are_left_to_torch() -> None:
    class Doubled(Tensor):
        pass

    weight = torch.randn(96, 48).as_subclass(Doubled)
    # float32 sums of 48 terms in another order; an eps of sums of up to 20 is 2e-6.
    assert torch.allclose(linear(torch.ones(2, 48), weight, impl="cpu"), weight.sum(1).expand(2, -1), atol=1e-5)
    assert not weight_cache._entries
