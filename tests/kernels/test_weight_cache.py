"""The packed-weight cache: packed once, again after every kind of change, dropped with the weight."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from bert_fast.kernels import linear
from bert_fast.kernels._common import weight_cache
from bert_fast.kernels.linear import cpu_backends


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
    return nn.Linear(48, 96, bias=False)


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


def through_data(module: nn.Linear) -> None:
    module.weight.data.copy_(torch.randn(96, 48))


def new_data(module: nn.Linear) -> None:
    module.weight.data = torch.randn(96, 48)


def in_inference_mode(module: nn.Linear) -> None:
    with torch.inference_mode():
        module.weight.data.mul_(2)


def one_value(module: nn.Linear) -> None:
    with torch.no_grad():
        module.weight[5, 5] = 100.0


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "optimizer step": step,
    "load_state_dict": lambda module: module.load_state_dict({"weight": torch.randn(96, 48)}),
    "load_state_dict, assigned": lambda m: m.load_state_dict({"weight": torch.randn(96, 48)}, assign=True),
    "data.copy_": through_data,
    "data = new": new_data,
    "inference mode": in_inference_mode,
    "one value": one_value,
    "to float64 and back": lambda module: module.double().float(),
    "init": lambda module: nn.init.normal_(module.weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_detected(change: Callable[[nn.Linear], object]) -> None:
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


def test_invalidate_after_a_write_that_is_not_detected(packs: list[Tensor]) -> None:
    module, x = layer(), torch.randn(5, 48)
    check(module, x)
    module.weight.data[1, 1] = 50.0
    weight_cache.invalidate(module.weight)
    check(module, x)
    assert len(packs) == 2


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
    through_data(first)
    check(second, x)


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
    torch.set_num_threads(1)
    check(module, x)
    through_data(module)
    check(module, x)
    connection.send("done")  # type: ignore[attr-defined]


def test_a_forked_process_packs_for_itself() -> None:
    module, x = layer(), torch.randn(5, 48)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has none of its parent's OpenMP threads
    check(module, x)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_child, args=(module, x, there))
    child.start()
    assert here.poll(60)
    assert here.recv() == "done"
    child.join()
    torch.set_num_threads(threads)
    check(module, x)


def test_subclasses_of_tensor_are_left_to_torch() -> None:
    class Doubled(Tensor):
        pass

    weight = torch.randn(96, 48).as_subclass(Doubled)
    # float32 sums of 48 terms in another order; an eps of sums of up to 20 is 2e-6.
    assert torch.allclose(linear(torch.ones(2, 48), weight, impl="cpu"), weight.sum(1).expand(2, -1), atol=1e-5)
    assert not weight_cache._entries
