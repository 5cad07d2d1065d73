"""SIGTERM and SIGINT at every moment of a run, once and twice: a run that resumes to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert_fast.pretrain import trainer as trainer_module
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import RunLog, read_log
from bert_fast.runtime.ranks import stop_signals

EXACT = ("step", "kind", "epoch", "loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "lr", "grad_norm")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(make_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    return make_config(steps=6, log_interval=1, eval_interval=2, checkpoint_interval=3, keep_last=0)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What an uninterrupted run leaves, once a test has made it."""
    return {}


def outcome(config: PretrainConfig) -> dict[str, Any]:
    """The log without measured times, the steps of the checkpoints, the best one, the final weights."""
    folder = Path(config.output_dir)
    lines = [{name: line[name] for name in EXACT if name in line} for line in read_log(folder / "log.jsonl")]
    checkpoints = checkpoint.list_checkpoints(folder / "checkpoints")
    return {
        "log": lines,
        "best": checkpoint.load_trainer_state(checkpoints[-1])["best"],
        "last": checkpoints[-1].name,
        "weights": (folder / "final" / "model.safetensors").read_bytes(),
    }


def expected(reference: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    if not reference:
        config = replace(config, output_dir=str(Path(config.output_dir).with_name("uninterrupted")))
        pretrain(config, quiet)
        reference.update(outcome(config))
    return reference


def quiet(_: str) -> None:
    pass


def at(
    patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, act: Callable[[], None], *, after: bool = False
) -> None:
    """Call `act` before (or after) call number `call` of a function."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            act()
        result = original(*arguments, **options)
        if calls == call and after:
            act()
        return result

    patch.setattr(owner, name, counted)


# moment: where the signal comes, and (interrupted, step) of the run; None if it ends as if there were no signal
MOMENTS: dict[str, tuple[Any, str, int, int | None]] = {
    "before the first step": (Trainer, "_meter", 1, 0),
    "while a batch is awaited": (trainer_module.Prefetch, "next", 2, 2),
    "in the backward pass": (Trainer, "_backward", 3, 3),
    "in the update": (Trainer, "_update", 4, 4),
    "while the log is written": (RunLog, "write", 2, 2),
    "in the first batch of an evaluation": (Trainer, "_held_out_batch", 1, 2),
    "in the third batch of an evaluation": (Trainer, "_held_out_batch", 3, 2),
    "at the end of an evaluation": (RunLog, "write", 3, 2),
    "in a checkpoint": (checkpoint, "save_training_state", 1, 2),
    "in a later checkpoint": (checkpoint, "_write_manifest", 2, 3),
    "while checkpoints are pruned": (checkpoint, "prune", 2, 3),
    "in the last step": (Trainer, "_update", 6, 6),
    "while the final model is written": (Trainer, "save_final", 1, None),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_leaves_a_run_that_resumes_to_the_bit(
    config: PretrainConfig, reference: dict[str, Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected(reference, config)
    owner, name, call, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at(patch, owner, name, call, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = pretrain(config, quiet)
    assert (result.interrupted, result.step) == ((None, 6) if step is None else (signal.SIGTERM, step))
    assert Path(result.model_dir).name == ("final" if step is None else f"step-{step:08d}")
    if step is not None:
        checkpoint.verify_folder(Path(result.model_dir))
        assert pretrain(config, quiet).interrupted is None
    assert outcome(config) == reference


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_second_interrupt_ends_the_run_at_once_and_loses_no_checkpoint(
    config: PretrainConfig, reference: dict[str, Any], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected(reference, config)
    owner, name, call, _ = MOMENTS[moment]

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        at(patch, owner, name, call, twice, after=name == "_write_manifest")
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, quiet)
    for path in checkpoint.list_checkpoints(Path(config.output_dir) / "checkpoints"):
        checkpoint.verify_folder(path)
    pretrain(config, quiet)
    assert outcome(config) == reference
    assert not list(Path(config.output_dir).rglob(".*")), "leftovers"


IGNORED = """
import os, signal
from bert_fast.runtime.ranks import stop_signals
with stop_signals() as received:
    os.kill(os.getpid(), signal.SIGINT)
    assert received() is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert received() == signal.SIGTERM
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As in a script that starts the run in the background."""
    command = f"trap '' INT; exec {sys.executable} -c '{IGNORED}'"
    subprocess.run(["sh", "-c", command], check=True, timeout=60)
    with stop_signals() as received_signal:
        assert received_signal() is None
