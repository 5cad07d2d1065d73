"""Steps that diverge: skipped before the update, recorded with their weights, replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast.cli.main import main
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain import divergence
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.divergence import Guard, replay
from bert_fast.pretrain.micro_batches import Position
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import read_log
from bert_fast.runtime.ranks import TrainingDivergedError


@pytest.fixture
def config(make_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    return make_config(steps=6, accumulation=2, log_interval=1, eval_interval=0, checkpoint_interval=0)


def at_step(monkeypatch: pytest.MonkeyPatch, steps: set[int], change: Callable[[Trainer], Any]) -> None:
    """Call `change(trainer)` between backward and update of `steps`."""
    original = Trainer._update

    def update(self: Trainer, taken: Any) -> Any:
        if self.step + 1 in steps:
            change(self)
        return original(self, taken)

    monkeypatch.setattr(Trainer, "_update", update)


def poison(trainer: Trainer) -> None:
    gradient = next(trainer.model.parameters()).grad
    assert gradient is not None
    gradient.view(-1)[3] = math.nan


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
def test_a_skipped_step_changes_neither_weights_nor_moments(
    config: PretrainConfig, name: Any, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OptimizerOptions(name=name, lr=1e-3, max_grad_norm=max_grad_norm)
    trainer = Trainer(replace(config, on_divergence="skip", optimizer=options), lambda text: None)
    at_step(monkeypatch, {3}, poison)
    for _ in range(2):
        trainer.train_step()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    moments = [dict(state) for state in trainer.optimizer.state.values()]
    moments = [{key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in state.items()} for state in moments]
    trainer.train_step()
    assert trainer.guard.skipped == 1
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    for state, saved in zip(trainer.optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(saved[key])) for key in saved)
    trainer.train_step()
    assert (trainer.guard.skipped, trainer.guard.in_a_row) == (1, 0)
    assert not torch.equal(next(trainer.model.parameters()), next(iter(before.values())))
    assert trainer._prefetch is not None
    trainer._prefetch.close()


def test_skipped_steps_are_counted_logged_and_recorded(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, {2, 3, 5}, poison)
    messages: list[str] = []
    result = pretrain(replace(config, on_divergence="skip", max_skips=3), messages.append)
    assert (result.step, result.skipped) == (6, 3)
    assert [line["skipped"] for line in read_log(Path(config.output_dir) / "log.jsonl") if line["kind"] == "train"] == [
        0, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    records = Path(config.output_dir) / "diverged"
    assert [path.name for path in checkpoint.list_checkpoints(records)] == [f"step-{step:08d}" for step in (2, 3, 5)]
    assert sum("was skipped: the gradient norm is nan" in text for text in messages) == 3


def test_too_many_skips_in_a_row_end_the_run(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, {2, 4, 5, 6}, poison)
    with pytest.raises(TrainingDivergedError, match=r"gradient norm is nan at step 5, the last of 2 skipped in a row"):
        pretrain(replace(config, on_divergence="skip", max_skips=2), lambda text: None)


def test_an_exploding_loss_stops_before_its_update_and_replays_to_the_bit(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(trainer: Trainer) -> None:
        with torch.no_grad():
            trainer.model.cls.predictions.bias[7] = 60.0

    at_step(monkeypatch, {3}, explode)
    with pytest.raises(TrainingDivergedError, match=r"the loss has exploded to \d+\.\d+ at step 4") as caught:
        pretrain(replace(config, explosion=3.0, checkpoint_interval=2), lambda text: None)
    folder = Path(config.output_dir) / "diverged" / "step-00000004"
    assert str(folder) in str(caught.value)
    assert "the last checkpoint before it is" in str(caught.value)
    again = replay(folder, device="cpu")
    assert again.loss == again.recorded_loss
    assert again.norm == again.recorded_norm
    assert len(again.micro_losses) == 2
    assert again.is_exact
    assert main(["replay", str(folder), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "warning" not in captured.err
    printed = captured.out.splitlines()
    assert printed[0] == f"step 4: {again.reason}"
    assert printed[2].split() == ["loss", f"{again.loss:.6g}", f"{again.loss:.6g}"]
    assert printed[3].split() == ["gradient", "norm", f"{again.norm:.6g}", f"{again.norm:.6g}"]
    assert len(printed) == 6
    assert main(["replay", str(folder), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["micro_losses"] == [list(pair) for pair in again.micro_losses]
    healthy = replay(folder, device="cpu", weights=Path(config.output_dir) / "checkpoints" / "step-00000002")
    assert healthy.loss < again.loss / 3
    assert not healthy.is_exact
    another = replace(again, norm=math.nextafter(again.norm, math.inf))
    with monkeypatch.context() as patched:
        patched.setattr(divergence, "replay", lambda *_, **__: another)
        assert main(["replay", str(folder)]) == 0
        assert "warning: loss or gradient norm are not the recorded bits" in capsys.readouterr().err
    nan = replace(again, loss=math.nan, recorded_loss=math.nan)
    assert nan.is_exact
    (folder / "batch.safetensors").write_bytes(b"")
    with pytest.raises(checkpoint.CorruptCheckpointError, match=r"batch\.safetensors is corrupt"):
        replay(folder)
    assert main(["replay", str(folder)]) == 2
    assert "bert-fast replay: error:" in capsys.readouterr().err


def refused(guard: Guard, *losses: float) -> list[bool]:
    """Whether the guard refuses each of these losses, in consecutive steps."""
    for step, loss in enumerate(losses):
        value, norm = torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0)
        verdict = torch.stack([guard.check(value, norm).double(), value, norm.double()])
        guard.enqueue(step, Position(0, step), verdict)
    return [verdict.refused for verdict in guard.drain(all_steps=True)]


def test_refused_losses() -> None:
    cpu = torch.device("cpu")
    assert refused(Guard("skip", 0.0, cpu), 5.0, math.inf, 4.0, math.nan, 1e30) == [False, True, False, True, False]
    assert refused(Guard("skip", 2.0, cpu), 5.0, 9.9, 10.5, 4.0, 11.0) == [False, False, True, False, True]
    # With "stop", updates after a refused one are skipped too: the record has the weights of the refused step.
    assert refused(Guard("stop", 0.0, cpu), 5.0, math.nan, 4.0) == [False, True, True]


def test_a_guard_resumes_from_its_state() -> None:
    first = Guard("skip", 2.0, torch.device("cpu"))
    refused(first, 5.0, 4.0, math.nan)
    second = Guard("skip", 2.0, torch.device("cpu"))
    second.restore(first.state())
    assert (second.skipped, second.in_a_row) == (1, 1)
    assert refused(second, 10.5, 9.0) == refused(first, 10.5, 9.0) == [True, False]
