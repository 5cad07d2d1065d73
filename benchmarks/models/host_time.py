"""Host time of a layer in training: what Python and dispatch cost, on a size whose arithmetic takes next to nothing.

    python -m benchmarks.models.host_time [--rounds 60]

Process CPU time of one thread, forward and backward, of 14 layers minus that of 2, divided by 12; the minimum of
interleaved rounds. "modules" is the same model with a hook that does nothing on each layer, which disables the fast
path (`bert_fast/models/fast_path.py`).
"""

from __future__ import annotations

import argparse
import time

import torch

from bert_fast import BertConfig, BertModel

FEW, MANY = 2, 14
TOKENS = 8


def model(layers: int, hooked: bool) -> BertModel:
    """A BERT of hidden size 32 in training mode."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
    )
    bert = BertModel(config).train()
    if hooked:
        for layer in bert.encoder.layer:
            layer.register_forward_hook(lambda *_: None)
    return bert


def step(bert: BertModel) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    start = time.process_time()
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    out = bert(input_ids=torch.arange(TOKENS), cu_seqlens=ends, max_seqlen=TOKENS).last_hidden_state
    middle = time.process_time()
    out.sum().backward()
    end = time.process_time()
    bert.zero_grad()
    return middle - start, end - middle


def measure(rounds: int) -> dict[str, tuple[float, float]]:
    """Microseconds of a layer, forward and backward, by path."""
    paths = {"fast path": False, "modules": True}
    models = {(path, layers): model(layers, hooked) for path, hooked in paths.items() for layers in (FEW, MANY)}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in models}
    for _ in range(rounds):
        for key, bert in models.items():
            times[key].append(step(bert))
    best = {key: [min(column) for column in zip(*values, strict=True)] for key, values in times.items()}
    result = {}
    for path in paths:
        few, many = best[path, FEW], best[path, MANY]
        forward, backward = ((b - a) / (MANY - FEW) * 1e6 for a, b in zip(few, many, strict=True))
        result[path] = forward, backward
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="host time of a layer in training")
    parser.add_argument("--rounds", type=int, default=60)
    torch.set_num_threads(1)
    for path, (forward, backward) in measure(parser.parse_args().rounds).items():
        print(f"{path:10} forward {forward:5.0f} us, backward {backward:5.0f} us a layer")


if __name__ == "__main__":
    main()
