"""`make demo`: from the text of this Python installation to a pretrained BERT-mini that transformers loads.

Prepares the corpus, compares one training step with transformers, pretrains for about three minutes on 2 cores, prints
the held-out loss and the unigram baseline, fills masks, and compares the logits with transformers. Everything is
written to demo_output/; an existing corpus is reused.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bert_fast._config import from_mapping
from bert_fast._io import write_json
from bert_fast.cli.main import RECIPES
from bert_fast.cli.models import load
from bert_fast.data import PackedBatch, PrepareConfig, prepare
from bert_fast.models import BertForPreTraining
from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.optimizer import make_optimizer
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.micro_batches import forward
from bert_fast.pretrain.setup import RunData, build_model, open_data
from bert_fast.pretrain.trainer import PretrainResult, pretrain
from bert_fast.tasks.fill_mask import fill_mask

TEXTS = (
    "return a new array with the same [MASK] as the input.",
    "if the file does not [MASK], an error is raised.",
    "the default [MASK] is none.",
    "returns true if the object is an instance of the given [MASK].",
)
WARMUPS, ROUNDS = 2, 7  # of the comparison; each round times one step of each model
STEP_SEQ_LEN, STEP_TOKENS = 128, 2048  # of the comparison: BERT's usual first-phase length
LOSS_TOLERANCE, LOGIT_TOLERANCE = 1e-4, 1e-4  # FP32 with another order of additions; logits are about 10


def heading(title: str) -> None:
    print(f"\n== {title}", flush=True)


def recipe(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return values


def prepare_corpus(config: PrepareConfig) -> None:
    """Prepare the built-in corpus unless it exists."""
    if (Path(config.output) / "manifest.json").is_file():
        print(f"reusing {config.output}")
    else:
        prepare(config)


def padded(batch: PackedBatch) -> dict[str, Tensor]:
    """The same examples padded to (B, S), with a mask."""
    lengths = batch.cu_seqlens.diff().long()
    B, S = len(lengths), int(lengths.max())
    mask = torch.arange(S)[None] < lengths[:, None]
    fields = {"input_ids": 0, "token_type_ids": 0, "labels": -100}
    columns = {name: torch.full((B, S), empty) for name, empty in fields.items()}
    for name, column in columns.items():
        column[mask] = getattr(batch, name)
    return {**columns, "attention_mask": mask.long(), "next_sentence_label": batch.next_sentence_label}


def training_step(model: torch.nn.Module, run: Callable[[], Any]) -> Callable[[], float]:
    """A call of forward, backward and AdamW that returns the loss."""
    optimizer = make_optimizer(model, OptimizerOptions(lr=1e-5))

    def step() -> float:
        loss = run().loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def same_model_twice(config: PretrainConfig) -> tuple[BertForPreTraining, Any, PackedBatch]:
    """Our model, transformers' BertForPreTraining with the same weights, and a batch; dropout 0.1 in both."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = replace(config.data, seq_len=STEP_SEQ_LEN, token_budget=STEP_TOKENS)
    data = open_data(options, config.seed)
    torch.manual_seed(0)
    dropout = replace(config.model, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ours = build_model(replace(config, data=options, model=dropout), data, None)
    folder = Path(config.output_dir).parent / "comparison"
    ours.save_pretrained(folder)
    theirs = transformers.BertForPreTraining.from_pretrained(folder)
    shutil.rmtree(folder)
    return ours, theirs, data.train.batch(0, 0)


def interleaved_medians(steps: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Median seconds of each step, interleaved so that disturbances affect all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUPS + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= WARMUPS:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in seconds.items()}


def compare_steps(config: PretrainConfig) -> dict[str, Any]:
    """Real tokens per second of one training step of each model, with the same weights, batch and AdamW."""
    ours, theirs, batch = same_model_twice(config)
    rectangle = padded(batch)
    with torch.no_grad():
        loss, expected = float(forward(ours.eval(), batch).loss), float(theirs.eval()(**rectangle).loss)
    count = f"{batch.num_sequences} sequences, {batch.num_tokens} real tokens"
    print(f"batch: {count}, {rectangle['input_ids'].numel()} with padding")
    print(f"loss without dropout: bert_fast {loss:.6f}, transformers {expected:.6f}")
    if abs(loss - expected) > LOSS_TOLERANCE:
        raise AssertionError(f"the losses without dropout differ by {abs(loss - expected)}")
    seconds = interleaved_medians(
        {
            "bert_fast": training_step(ours.train(), lambda: forward(ours, batch)),
            "transformers": training_step(theirs.train(), lambda: theirs(**rectangle)),
        }
    )
    rates = {name: batch.num_tokens / median for name, median in seconds.items()}
    for name, median in seconds.items():
        print(f"{name:<13} {1000 * median:8.1f} ms per step   {rates[name]:8,.0f} real tokens/s")
    speedup = seconds["transformers"] / seconds["bert_fast"]
    print(f"bert_fast is {speedup:.2f} times as fast (medians of {ROUNDS} interleaved steps, dropout 0.1)")
    return {
        "tokens": batch.num_tokens,
        "padded_tokens": rectangle["input_ids"].numel(),
        "loss": {"bert_fast": loss, "transformers": expected},
        "seconds": seconds,
        "tokens_per_second": rates,
        "speedup": speedup,
    }


def fill_masks(folder: str) -> list[dict[str, Any]]:
    """The model's candidates for each [MASK]."""
    model, tokenizer = load("BertForMaskedLM", folder, "cpu")
    rows = []
    for text in TEXTS:
        candidates = fill_mask(model, tokenizer, text)[0]
        rows.append({"text": text, "candidates": [list(candidate) for candidate in candidates]})
        print(f"{text}\n    " + "  ".join(f"{token} {probability:.1%}" for token, probability in candidates))
    return rows


def compare_logits(folder: str, data: RunData) -> float:
    """The largest difference between our and transformers' logits of the saved checkpoint, on held-out examples."""
    import transformers

    batch = padded(data.held_out.batch(0, 0))
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    ours = BertForPreTraining.from_pretrained(folder)
    theirs = transformers.BertForPreTraining.from_pretrained(folder).eval()
    with torch.no_grad():
        a, b = ours(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool()
    difference = max(
        float((a.prediction_logits[real] - b.prediction_logits[real]).abs().max()),
        float((a.seq_relationship_logits - b.seq_relationship_logits).abs().max()),
    )
    print(f"transformers loads {folder}; largest logit difference: {difference:.2e}")
    if difference > LOGIT_TOLERANCE:
        raise AssertionError(f"the logits differ by {difference}; expected at most {LOGIT_TOLERANCE}")
    return difference


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table, for the README."""
    step, run = summary["step"], summary["pretraining"]
    rows = [
        ("one training step, bert_fast", f"{step['tokens_per_second']['bert_fast']:,.0f} real tokens/s"),
        ("one training step, transformers", f"{step['tokens_per_second']['transformers']:,.0f} real tokens/s"),
        ("bert_fast / transformers", f"{step['speedup']:.2f}x"),
        ("pretraining", f"{run['steps']} steps, {run['tokens']:,} tokens, {run['seconds']:.0f} s"),
        ("held-out MLM loss, unigram baseline", f"{run['unigram_loss']:.3f}"),
        ("held-out MLM loss, the model", f"{run['mlm_loss']:.3f}"),
        ("held-out MLM accuracy", f"{run['mlm_accuracy']:.1%}"),
        ("held-out NSP accuracy", f"{run['nsp_accuracy']:.1%}"),
        ("largest logit difference from transformers", f"{summary['logit_difference']:.1e}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"| {'measured by `make demo`':<{width}} | {summary['machine']} |", f"|{'-' * (width + 2)}|---|"]
    return "\n".join([*lines, *(f"| {name:<{width}} | {value} |" for name, value in rows)])


def machine() -> str:
    """The processor, torch's threads and version."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def summarise(result: PretrainResult, unigram: float) -> dict[str, Any]:
    return {
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "unigram_loss": unigram,
        **result.metrics,
    }


def main() -> int:
    """Run the demo; exit code 0 if every comparison passed."""
    begin = time.perf_counter()
    print(f"bert_fast demo on {machine()}")
    heading("corpus: the language reference and the docstrings of this Python installation")
    prepare_corpus(PrepareConfig(**recipe("demo-prepare")))
    config = from_mapping(PretrainConfig, recipe("demo"))
    output = Path(config.output_dir).parent
    heading("one training step of BERT-mini, compared with transformers: same weights, same batch, AdamW")
    step = compare_steps(config)

    data = open_data(config.data, config.seed)
    unigram = data.unigram_loss()
    heading(f"pretraining: {config.steps} steps of {config.data.token_budget} tokens, about three minutes on 2 cores")
    print(f"held-out MLM loss of the unigram baseline: {unigram:.3f}", flush=True)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    result = pretrain(config)
    if result.interrupted is not None:
        return 128 + result.interrupted
    metrics = result.metrics
    print(f"held-out MLM loss {metrics['mlm_loss']:.3f}, unigram baseline {unigram:.3f}")
    print(f"held-out MLM accuracy {metrics['mlm_accuracy']:.1%}, NSP accuracy {metrics['nsp_accuracy']:.1%}")

    heading("fill in the masks")
    filled = fill_masks(result.model_dir)
    heading("the checkpoint in transformers")
    difference = compare_logits(result.model_dir, data)
    summary = {
        "machine": machine(),
        "step": step,
        "pretraining": summarise(result, unigram),
        "masks": filled,
        "logit_difference": difference,
        "model": result.model_dir,
        "seconds": time.perf_counter() - begin,
    }
    write_json(output / "summary.json", summary)
    heading(f"summary, {summary['seconds']:.0f} s in total; also in {output / 'summary.json'}")
    print(table(summary))
    print(f'\nTry:  bert-fast fill-mask {os.path.relpath(result.model_dir)} "the [MASK] of the list."')
    return 0


if __name__ == "__main__":
    sys.exit(main())
