"""Steps of sentence-transformers' trainer with a model and with its fused copy: embeddings by multiple negatives.

    python -m benchmarks.models.trainer_speed [--steps 12] [--batch 32] [--quick] [--record]

MiniLM-L6's weights where they are installed (else random ones of that size), pairs of neighbouring sentences of the
documentation of this Python installation, at most 128 tokens, float32 and bfloat16 autocast, AdamW. The two models are
trained in turns, `ROUNDS` times, a few steps each, with dropout; the first step of each turn is not timed. Before that
both are trained for three steps without dropout, whose losses have to agree.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bert_fast
from benchmarks.models.cpu_inference import WEIGHTS, weights_of
from benchmarks.models.encode_speed import paragraphs
from benchmarks.runner.whole_models import Size
from bert_fast.bench.devices import environment
from bert_fast.bench.runner import arguments, exit_code, parse, write
from bert_fast.bench.samples import summary

ROUNDS, COMPARED = 4, 3
AGREE = {"fp32": 1e-3, "bf16": 5e-2}  # of the losses, relative: AdamW turns the rounding of small gradients into steps


@dataclass(frozen=True)
class Row:
    """One model in one precision; milliseconds of a step."""

    case: str
    variant: str
    ms: float
    ms_low: float
    ms_high: float
    calls: int
    first_loss: float
    last_loss: float
    ratio_to_best_peer: float | None = None
    refused: str = ""


def model_of(quick: bool, dropout: float) -> Any:
    """SentenceTransformer with mean pooling."""
    from importlib.util import find_spec

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    size = Size("tiny", 1, 32, 64, heads=2, vocabulary=30522) if quick else Size("MiniLM", 6, 384, 1536)
    spec = find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"trainer_speed needs the package {WEIGHTS.replace('_', '-')}, whose tokenizer it takes")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    with tempfile.TemporaryDirectory() as temporary:
        if quick:
            from transformers import AutoTokenizer

            weights_of("tiny", size).save_pretrained(temporary)
            AutoTokenizer.from_pretrained(folder).save_pretrained(temporary)
            folder = Path(temporary)
        transformer = Transformer(str(folder), max_seq_length=128, config_kwargs=settings)
        width = transformer.get_embedding_dimension()
        return SentenceTransformer(modules=[transformer, Pooling(width)], device="cpu")


def turn(model: Any, data: Any, precision: str, batch: int, steps: int, output: str) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps of one run of the trainer, whose optimizer is new."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter() - self.begin)

    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=2e-5,
            bf16=precision == "bf16",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[Clock()],
    )
    trainer.train()
    return times, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure(precision: str, batch: int, steps: int, quick: bool) -> list[Row]:
    """The unfused and the fused model in turns."""
    import copy

    from datasets import Dataset

    torch.manual_seed(0)
    texts = paragraphs(2 * batch * steps)
    data = Dataset.from_dict({"anchor": texts[0::2], "positive": texts[1::2]})

    def models(dropout: float) -> dict[str, Any]:
        theirs = model_of(quick, dropout)
        return {"sentence-transformers": theirs, "bert_fast fuse": bert_fast.fuse(copy.deepcopy(theirs))}

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as output:
        losses = {name: turn(model, data, precision, batch, COMPARED, output)[1] for name, model in models(0.0).items()}
        timed = models(0.1)
        for _ in range(1 if quick else ROUNDS):
            for name, model in timed.items():
                times.setdefault(name, []).extend(turn(model, data, precision, batch, steps, output)[0][1:])
    expected, own = losses.values()
    worst = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(expected, own, strict=True))
    rows = []
    medians = {name: summary(seconds).median for name, seconds in times.items()}
    for name, seconds in times.items():
        ours = name.startswith("bert_fast")
        refused = f"wrong: losses differ by {worst:.3g}, relative" if ours and worst > AGREE[precision] else ""
        found = summary(seconds)
        rows.append(
            Row(
                f"MiniLM, {batch} pairs, {precision} train",
                name,
                found.median * 1e3,
                found.low * 1e3,
                found.high * 1e3,
                found.calls,
                losses[name][0],
                losses[name][-1],
                medians["sentence-transformers"] / medians[name] if ours else None,
                refused,
            )
        )
    return rows


if __name__ == "__main__":
    parser = arguments("sentence-transformers' trainer with a model and its fused copy")
    parser.add_argument("--steps", type=int, default=6, help="of each turn")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    options, machine = parse(parser)
    rows = [row for precision in AGREE for row in measure(precision, options.batch, options.steps, options.quick)]
    for row in rows:
        print(f"{row.case}, {row.variant}: {row.ms:.1f} ms ({row.ms_low:.1f} to {row.ms_high:.1f}), "
              f"loss {row.first_loss:.4f} to {row.last_loss:.4f} {row.refused}")  # fmt: skip
    report = {"environment": environment(machine), "rows": [asdict(row) for row in rows]}
    if options.record:
        write(report, "trainer_speed", options.results)
    sys.exit(exit_code([f"{row.case}, {row.variant}: {row.refused}" for row in rows if row.refused]))
