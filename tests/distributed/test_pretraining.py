"""Several ranks compute what one computes, and a run goes on with any number of them, sharded or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bert_fast.pretrain.config import DataOptions
from bert_fast.pretrain.setup import open_data

NAMES = ("step", "loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy", "grad_norm", "tokens", "epoch", "lr")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Settings = dict[str, Any]


def log(folder: str | Path) -> list[dict[str, Any]]:
    """A run's log without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in NAMES if name in line} for line in lines]


def assert_same_run(found: str, expected: str) -> None:
    """Equal but for rounding: losses, norms, the examples' tokens, held-out results and the final weights."""
    ours, theirs = log(found), log(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        # fp32 sums of a few thousand terms in another order, and what six steps make of it.
        assert a == pytest.approx(b, rel=2e-5)
    weights, others = (load_file(Path(folder) / "final" / "model.safetensors") for folder in (found, expected))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        # AdamW's first steps are of the size of lr whatever the gradient's: where that is all rounding, so is the sign.
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def examples(*jobs: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(epoch, number) of every example that any rank of these jobs took in a step that was not done again later."""
    first_of = [min(step for rank in job for step, _ in rank["examples"]) for job in jobs]
    kept = []
    for job, end in zip(jobs, [*first_of[1:], 10**9], strict=True):
        kept += [tuple(pair) for rank in job for step, pairs in rank["examples"] if step < end for pair in pairs]
    return kept


def run(start_ranks: Callable[..., Any], world: int, config: Settings, **job: Any) -> list[dict[str, Any]]:
    left: list[dict[str, Any]] = start_ranks(world, config=config, **job).wait()
    assert [rank["error"] for rank in left] == [None] * world
    return left


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of one rank that several tests compare with, by name."""
    return {"folder": str(tmp_path_factory.mktemp("alone"))}


@pytest.fixture
def one_rank(alone: dict[str, str], start_ranks: Callable[..., Any], settings: Settings) -> str:
    """The folder of the run of one rank."""
    if "run" not in alone:
        run(start_ranks, 1, {**settings, "output_dir": alone["folder"]})
        alone["run"] = alone["folder"]
    return alone["run"]


def test_a_run_of_four_ranks_stopped_by_sigterm_to_one_goes_on_with_two_and_is_the_run_of_one(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    """With dropout, which depends on the micro-batch and not on who computes it."""
    act = {"rank": 2, "step": 3, "what": "terminate"}
    four = run(start_ranks, 4, settings, act=act)
    # The others hear of it while the next step runs.
    assert [(rank["result"]["interrupted"], rank["result"]["step"]) for rank in four] == [(15, 4)] * 4
    assert Path(four[0]["result"]["model_dir"]).name == "step-00000004"
    two = run(start_ranks, 2, settings)
    assert any("ranks are now 2; the checkpoint was written by 4" in text for text in two[0]["said"])
    assert two[1]["said"] == []
    assert_same_run(settings["output_dir"], one_rank)
    assert len({len(rank["examples"]) for rank in four + two}) <= 2


def test_each_example_of_an_epoch_is_seen_once_though_ranks_leave(
    start_ranks: Callable[..., Any], settings: Settings
) -> None:
    data = open_data(DataOptions(**settings["data"]), 0).train
    config = {**settings, "steps": None, "epochs": 1, "accumulation": 1, "eval_interval": 0}
    batches = data.num_batches(0)
    act = {"rank": "all", "step": batches // 2, "what": "terminate"}
    four = run(start_ranks, 4, config, act=act)
    two = run(start_ranks, 2, config)
    seen = examples(four, two)
    assert sorted(seen) == [(0, number) for number in range(data.num_examples(0))]


def test_two_ranks_with_shards_and_then_one_without_are_the_run_of_one(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    act = {"rank": "all", "step": 3, "what": "terminate"}
    run(start_ranks, 2, {**settings, "parallel": "fsdp"}, act=act)
    last = Path(settings["output_dir"]) / "checkpoints" / "step-00000004"
    assert len(list((last / "optimizer").glob("*.safetensors"))) == 2
    assert {path.suffix for path in last.rglob("*") if path.is_file()} == {".json", ".safetensors", ".txt"}  # no pickle
    run(start_ranks, 1, settings)
    assert_same_run(settings["output_dir"], one_rank)


def test_a_run_without_shards_goes_on_with_them(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    start = str(Path(one_rank) / "checkpoints" / "step-00000003")
    run(start_ranks, 2, {**settings, "parallel": "fsdp", "resume": start})
    ours, theirs = log(settings["output_dir"]), [line for line in log(one_rank) if line["step"] > 3]
    assert ours == [pytest.approx(line, rel=2e-5) for line in theirs]


def test_more_ranks_than_micro_batches_and_fewer_examples_than_ranks(
    start_ranks: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    """Steps of about five examples on three ranks, and of one on two; without dropout, since micro-batches differ."""
    model = {**settings["model"], **NO_DROPOUT}
    for world, budget in ((3, 128), (2, 32)):
        data = {**settings["data"], "token_budget": budget}
        config = {**settings, "model": model, "data": data, "accumulation": 1, "checkpoint_interval": 0}
        folders = [str(tmp_path / f"{world}-{ranks}") for ranks in (1, world)]
        for ranks, folder in zip((1, world), folders, strict=True):
            run(start_ranks, ranks, {**config, "output_dir": folder})
        assert_same_run(folders[1], folders[0])


def test_gradients_travel_as_bf16_where_that_is_asked_for(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    run(start_ranks, 2, {**settings, "gradient_communication": "bf16", "steps": 1})
    found, expected = log(settings["output_dir"])[0], log(one_rank)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-8)
    assert found["grad_norm"] != pytest.approx(expected["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_go_with_every_way_to_compute_a_step(
    start_ranks: Callable[..., Any], settings: Settings, tmp_path: Path, precision: str
) -> None:
    """Recomputation, static shapes, gradients as bf16, three ranks with micro-batches of other sizes."""
    extra = {"recompute": True, "static_shapes": True, "gradient_communication": "bf16", "precision": precision}
    logs = []
    for parallel in ("ddp", "fsdp"):
        folder = str(tmp_path / parallel)
        config = {**settings, **extra, "parallel": parallel, "steps": 3, "checkpoint_interval": 0}
        run(start_ranks, 3, {**config, "output_dir": folder})
        logs.append(log(folder))
    # Gradients of 8 bits, rounded before they are summed up.
    for ours, theirs in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours.get("grad_norm", 0.0) == pytest.approx(theirs.get("grad_norm", 0.0), rel=1e-2)
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-6)
