"""Throughput of the input pipeline alone: planning, reading, assembling and masking packed batches, on one core.

    python -m benchmarks.models.data_speed [--tokens N] [--seconds S] [--record]

The text is synthetic: documents of 8 sentences of 24 tokens on average with BERT's vocabulary; a fifth of the tokens
are `##` pieces. Rates are per second of CPU time of this process, so that other load does not affect them; the load at
the start and the tokens/s of wall time are reported too. `FLOOR` is the lowest acceptable rate.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bert_fast.bench.devices import Cpu, environment
from bert_fast.bench.runner import write
from bert_fast.data import PretrainingData, PretrainingDataConfig, save_tokenizer
from bert_fast.data.host_numpy import CONTINUES
from bert_fast.data.shards import SPLITS, ShardWriter, write_manifest
from bert_fast.data.vocab import SPECIAL_TOKENS, load_wordpiece

FLOOR = 1_000_000  # tokens per second and core
VOCABULARY, PIECES = 30522, 6104  # tokens, and how many of them are `##` pieces
SPANS = {"max_span": 10}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "S = 128, sentence pairs": ("english", {"seq_len": 128}),
    "S = 512, sentence pairs": ("english", {"seq_len": 512}),
    "S = 512, one text": ("english", {"seq_len": 512, "next_sentence": False}),
    "S = 512, one text, single tokens": ("english", {"seq_len": 512, "next_sentence": False, "whole_words": False}),
    "S = 512, one text, spans": ("english", {"seq_len": 512, "next_sentence": False, **SPANS}),
    "S = 512, one text, Chinese words": ("chinese", {"seq_len": 512, "next_sentence": False}),
    "S = 512, one text, Chinese words, spans": ("chinese", {"seq_len": 512, "next_sentence": False, **SPANS}),
}


@dataclass(frozen=True)
class DataRow:
    """One case: tokens per second of CPU time (`plan`, `batch`), and of batches per second of wall time (`wall`)."""

    case: str
    host: str
    tokens: int
    plan: float
    batch: float
    wall: float


def make_folder(folder: Path, kind: str, tokens: int) -> None:
    """Write a prepared folder of random tokens: words continue by marks in "chinese", by `##` pieces in "english"."""
    generator = np.random.default_rng(0)
    words = [f"word{i}" for i in range(VOCABULARY - PIECES - len(SPECIAL_TOKENS))]
    vocabulary = [*SPECIAL_TOKENS, *words, *(f"##piece{i}" for i in range(PIECES))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    save_tokenizer(load_wordpiece(folder / "vocab.txt"), folder)
    splits = {}
    for split, share in zip(SPLITS, (1.0, 0.01), strict=True):
        with ShardWriter(folder / split, 2**22) as writer:
            while writer.tokens < share * tokens:
                ends = np.cumsum(generator.integers(4, 45, size=8)).astype(np.int32)
                high = VOCABULARY if kind == "english" else VOCABULARY - PIECES
                ids = generator.integers(len(SPECIAL_TOKENS), high, size=ends[-1]).astype(np.int32)
                if kind == "chinese":
                    ids |= (generator.random(ids.size) < 0.4).astype(np.int32) * CONTINUES
                writer.add(ids, ends)
        splits[split] = writer.counts()
    write_manifest(folder, {"splits": splits, "vocab_size": VOCABULARY, "settings": {}, "versions": {}}, {})


def measure(case: str, folder: Path, changes: dict[str, object], host: str, seconds: float) -> DataRow:
    """Time the planning of epochs, then the batches of one epoch, for about `seconds` each."""
    settings = {"folder": str(folder), "token_budget": 16384, "checksums": False, "host": host, **changes}
    data = PretrainingData(PretrainingDataConfig(**settings))  # type: ignore[arg-type]
    data.batch(0, 0)
    begin, epochs = time.process_time(), 0
    while time.process_time() - begin < seconds:
        epochs += 1
        data.plan(epochs)
    plan = epochs * int(data.plan(0).lengths.sum()) / (time.process_time() - begin)
    order = np.random.default_rng(0).permutation(data.num_batches(0)).tolist()
    begin, clock, tokens, batches = time.process_time(), time.perf_counter(), 0, 0
    while time.process_time() - begin < seconds:
        tokens += data.batch(0, order[batches % len(order)]).num_tokens
        batches += 1
    cpu_time, wall_time = time.process_time() - begin, time.perf_counter() - clock
    return DataRow(case, host, tokens, round(plan), round(tokens / cpu_time), round(tokens / wall_time))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens of the synthetic text")
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time for each figure")
    parser.add_argument("--host", default="auto", choices=["auto", "cpp", "numpy"])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/<device>/data_speed.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("english", "chinese"):
            (Path(temporary) / kind).mkdir()
            make_folder(Path(temporary) / kind, kind, options.tokens)
        print(f"{'million tokens/s':<42}{'plan':>9}{'batches':>9}{'wall time':>14}")
        for case, (kind, changes) in CASES.items():
            row = measure(case, Path(temporary) / kind, changes, options.host, options.seconds)
            rows.append(row)
            print(f"{case:<42}{row.plan / 1e6:>9.1f}{row.batch / 1e6:>9.1f}{row.wall / 1e6:>14.1f}")
    slow = [row.case for row in rows if row.batch < FLOOR]
    print(
        f"load of the machine: {load:.1f} on {os.cpu_count()} cores; floor {FLOOR / 1e6:.0f} million tokens/s per core"
    )
    report = {"environment": environment(Cpu()), "load": load, "floor": FLOOR, "rows": [asdict(row) for row in rows]}
    if options.record:
        write(report, "data_speed")
    else:
        print(json.dumps(report["environment"]))
    print(f"below the floor: {', '.join(slow)}" if slow else "every case is above the floor")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
