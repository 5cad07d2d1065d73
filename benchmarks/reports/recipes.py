"""Tokens, memory and hours of the pretraining recipes, computed from their settings.

    python -m benchmarks.reports.recipes

None of this was measured on a GPU. FLOPs are those of `bert_fast.pretrain.metrics.model_flops`, which training
reports too, for sequences of the recipe's maximum length. Hours are FLOPs over `PEAK` (dense BF16 of an H200) times
`MFU`, and over 8 GPUs with the efficiency `SCALING`; both shares are assumed. Memory is 16 bytes per parameter
(weights, gradients and two moments in FP32), 34 E bytes per layer and token of a micro-batch, and `OTHER`. The recipes
contain the lines of `Estimate`, and a test compares them with what is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from bert_fast import BertConfig
from bert_fast._config import from_mapping
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.metrics import model_flops

RECIPES = Path(__file__).resolve().parents[2] / "bert_fast" / "recipes"
PEAK, MFU, SCALING = 790e12, 0.4, 0.95
OTHER = 2 * 2**30  # the CUDA context, workspaces, logits at masked positions
CHINESE, ENGLISH = 21128, 30522


@dataclass(frozen=True)
class Estimate:
    """Cost of a recipe: tokens of a step (`batch`) and of all steps (`tokens`), FLOPs per token, bytes on one GPU."""

    steps: int
    batch: int
    tokens: float
    flops: float
    memory: float

    @property
    def hours(self) -> float:
        """Hours on one GPU."""
        return self.flops * self.tokens / (PEAK * MFU) / 3600

    def lines(self) -> list[str]:
        """The comment in the recipe."""
        flops, tokens = f"{self.flops / 1e6:.0f} MFLOP a token", f"{self.tokens / 1e9:.1f} G"
        eight = self.hours / 8 / SCALING
        return [
            f"# Tokens: {self.steps:,} steps x {self.batch:,} = {tokens}.",
            f"# Memory: about {self.memory / 2**30:.0f} GiB on each GPU (estimate).",
            f"# Hours, an ESTIMATE, not measured: {flops} x {tokens} tokens / (790 TFLOP/s x MFU {MFU}) =",
            f"# {self.hours:.1f} h on 1 H200, {eight:.1f} h on 8 at {SCALING:.0%} of 8 times the speed.",
        ]


def estimate(config: PretrainConfig, vocab_size: int) -> Estimate:
    """The cost of a recipe with a vocabulary of `vocab_size` tokens."""
    size = BertConfig.size(config.model.size, vocab_size=vocab_size)
    hidden, layers, inner = size.hidden_size, size.num_hidden_layers, size.intermediate_size
    length = config.data.seq_len
    embeddings = (vocab_size + size.max_position_embeddings) * hidden
    parameters = embeddings + layers * (4 * hidden**2 + 2 * hidden * inner) + 2 * hidden**2
    batch = config.data.token_budget * config.accumulation
    assert config.steps is not None
    return Estimate(
        steps=config.steps,
        batch=batch,
        tokens=float(config.steps * batch),
        flops=model_flops(size, tokens=1, squares=length, masked=config.data.mask_prob, sequences=1 / length),
        memory=16 * parameters + 34 * hidden * layers * config.data.token_budget + OTHER,
    )


def recipes() -> dict[str, Estimate]:
    """The estimate of every pretraining recipe for GPUs, by name."""
    estimates = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem.startswith("bert-"):
            config = from_mapping(PretrainConfig, values)
            estimates[path.stem] = estimate(config, CHINESE if "chinese" in path.stem else ENGLISH)
    return estimates


def main() -> int:
    for name, cost in recipes().items():
        print("\n".join([name, *cost.lines()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
