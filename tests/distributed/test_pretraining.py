"""Several ranks compute what one rank computes, and a run resumes with any number of ranks, sharded or not."""

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
    """A run's log without measured times."""
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in NAMES if name in line} for line in lines]


def assert_same_run(folder: str, expected: str) -> None:
    """Equal up to rounding: losses, norms, token counts, held-out results and the final weights."""
    lines, expected_lines = log(folder), log(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in expected_lines]
    for a, b in zip(lines, expected_lines, strict=True):
        # fp32 sums of a few thousand terms in another order, over six steps.
        assert a == pytest.approx(b, rel=2e-5)
    weights, expected_weights = (load_file(Path(run) / "final" / "model.safetensors") for run in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        # AdamW's first steps have the size of lr for any gradient: one that is only rounding has a random sign.
        torch.testing.assert_close(
            value, expected_weights[name], rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def examples(*jobs: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(epoch, index) of every example of these jobs, without steps that a later job repeated."""
    first_of = [min(step for rank in job for step, _ in rank["examples"]) for job in jobs]
    pairs_seen = []
    for job, end in zip(jobs, [*first_of[1:], 10**9], strict=True):
        pairs_seen += [tuple(pair) for rank in job for step, pairs in rank["examples"] if step < end for pair in pairs]
    return pairs_seen


def run(start_ranks: Callable[..., Any], world_size: int, config: Settings, **job: Any) -> list[dict[str, Any]]:
    outputs: list[dict[str, Any]] = start_ranks(world_size, config=config, **job).wait()
    assert [rank["error"] for rank in outputs] == [None] * world_size
    return outputs


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folder of a run of one rank that several tests compare with, and "run" once it is there."""
    return {"folder": str(tmp_path_factory.mktemp("alone"))}


@pytest.fixture
def one_rank(alone: dict[str, str], start_ranks: Callable[..., Any], settings: Settings) -> str:
    """The folder of the finished run of one rank."""
    if "run" not in alone:
        run(start_ranks, 1, {**settings, "output_dir": alone["folder"]})
        alone["run"] = alone["folder"]
    return alone["run"]


def test_four_ranks_stopped_by_sigterm_to_one_and_resumed_with_two_equal_one_rank(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    """With dropout, which depends on the micro-batch and not on its rank."""
    act = {"rank": 2, "step": 3, "what": "terminate"}
    four = run(start_ranks, 4, settings, act=act)
    # The ranks learn of the signal within the evaluation after step 3, which the resumed run then does first.
    assert [(rank["result"]["interrupted"], rank["result"]["step"]) for rank in four] == [(15, 3)] * 4
    assert Path(four[0]["result"]["model_dir"]).name == "step-00000003"
    assert [line["step"] for line in log(settings["output_dir"])] == [1, 2, 3]
    two = run(start_ranks, 2, settings)
    assert any("ranks are now 2; the checkpoint was written by 4" in text for text in two[0]["messages"])
    assert two[1]["messages"] == []
    assert_same_run(settings["output_dir"], one_rank)
    assert len({len(rank["examples"]) for rank in four + two}) <= 2


def test_every_example_of_an_epoch_is_used_once_when_the_number_of_ranks_changes(
    start_ranks: Callable[..., Any], settings: Settings
) -> None:
    data = open_data(DataOptions(**settings["data"]), 0).train
    config = {**settings, "steps": None, "epochs": 1, "accumulation": 1, "eval_interval": 0}
    batches = data.num_batches(0)
    act = {"rank": "all", "step": batches // 2, "what": "terminate"}
    four = run(start_ranks, 4, config, act=act)
    two = run(start_ranks, 2, config)
    assert sorted(examples(four, two)) == [(0, number) for number in range(data.num_examples(0))]


def test_two_sharded_ranks_resumed_with_one_equal_one_rank(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    act = {"rank": "all", "step": 3, "what": "terminate"}
    run(start_ranks, 2, {**settings, "parallel": "fsdp"}, act=act)
    last = Path(settings["output_dir"]) / "checkpoints" / "step-00000003"
    assert len(list((last / "optimizer").glob("*.safetensors"))) == 2
    assert {path.suffix for path in last.rglob("*") if path.is_file()} == {".json", ".safetensors", ".txt"}  # no pickle
    run(start_ranks, 1, settings)
    assert_same_run(settings["output_dir"], one_rank)


def test_a_run_of_one_rank_resumes_sharded(start_ranks: Callable[..., Any], settings: Settings, one_rank: str) -> None:
    start = str(Path(one_rank) / "checkpoints" / "step-00000003")
    run(start_ranks, 2, {**settings, "parallel": "fsdp", "resume": start})
    expected = [line for line in log(one_rank) if line["step"] > 3]
    # float32 sums in another order, as in assert_same_run.
    assert log(settings["output_dir"]) == [pytest.approx(line, rel=2e-5) for line in expected]


def test_more_ranks_than_micro_batches_and_fewer_examples_than_ranks(
    start_ranks: Callable[..., Any], settings: Settings, tmp_path: Path
) -> None:
    """Steps of about five examples on three ranks, and of one on two; no dropout, since micro-batches differ."""
    model = {**settings["model"], **NO_DROPOUT}
    for world_size, budget in ((3, 128), (2, 32)):
        data = {**settings["data"], "token_budget": budget}
        config = {**settings, "model": model, "data": data, "accumulation": 1, "checkpoint_interval": 0}
        folders = [str(tmp_path / f"{world_size}-{ranks}") for ranks in (1, world_size)]
        for ranks, folder in zip((1, world_size), folders, strict=True):
            run(start_ranks, ranks, {**config, "output_dir": folder})
        assert_same_run(folders[1], folders[0])


def test_gradients_are_reduced_in_bf16_on_request(
    start_ranks: Callable[..., Any], settings: Settings, one_rank: str
) -> None:
    run(start_ranks, 2, {**settings, "gradient_communication": "bf16", "steps": 1})
    line, expected = log(settings["output_dir"])[0], log(one_rank)[0]
    # The loss is before the update, and summed in float32: 8 eps (1.2e-7).
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    # bf16 rounds a gradient by 2^-8 of it at most; over all gradients it is random, and the norm is off by 2e-4.
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-8)
    assert line["grad_norm"] != pytest.approx(expected["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharding_works_with_every_step_setting(
    start_ranks: Callable[..., Any], settings: Settings, tmp_path: Path, precision: str
) -> None:
    """Recomputation, static shapes, bf16 gradients, three ranks with micro-batches of different sizes."""
    extra = {"recompute": True, "static_shapes": True, "gradient_communication": "bf16", "precision": precision}
    logs = []
    for parallel in ("ddp", "fsdp"):
        folder = str(tmp_path / parallel)
        config = {**settings, **extra, "parallel": parallel, "steps": 3, "checkpoint_interval": 0}
        run(start_ranks, 3, {**config, "output_dir": folder})
        logs.append(log(folder))
    # Gradients are rounded to bf16, 8 bits of mantissa, before they are summed.
    for ddp, fsdp in zip(*logs, strict=True):
        assert ddp["loss"] == pytest.approx(fsdp["loss"], rel=1e-3)
        assert ddp.get("grad_norm", 0.0) == pytest.approx(fsdp.get("grad_norm", 0.0), rel=1e-2)
    # Before the first update the losses have the same terms, summed in float32: 8 eps (1.2e-7).
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-6)
