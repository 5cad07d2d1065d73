"""README's promise: on the CPU a text's vector has the same bits whatever the batch, its order and the threads.

It holds where the products of inference are ours; each instruction set has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bert_fast
from bert_fast.data import load_tokenizer
from bert_fast.kernels._common import extensions
from bert_fast.kernels.linear import cpu_backends
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.pooling import POOLINGS
from bert_fast.testing.runs import threads

ISAS = ("generic", "avx2", "avx512", "avx512bf16")
KINDS = ("float32", "bfloat16", "int8")
WORDS = "the a small old red green bird cat river house sings runs sleeps near under over and then quietly again"


def check(folder: Path) -> list[str]:
    """The kinds whose vectors were compared here; raises where one depends on its batch."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]) + "\n")
    tokenizer = load_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2, 3, 7, 8, 15, 17, 31, 33, 62, 64, 126, 1, 40])
    words = WORDS.split()
    texts = [
        " ".join(words[i] for i in torch.randint(len(words), (int(count),), generator=generator)) for count in counts
    ]
    # Widths that are multiples of no vector, and those of a real model.
    sizes = ((60, 3, 100), (192, 3, 768))
    compared = []
    for kind in KINDS:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        if cpu_backends.BACKENDS[dtype].inference != "tiles":
            continue  # a product of torch's, of which nothing is promised
        for width, heads, intermediate in sizes:
            torch.manual_seed(0)
            config = BertConfig(
                vocab_size=30,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=heads,
                intermediate_size=intermediate,
            )
            model = BertModel(config).eval().to(dtype)
            model = bert_fast.quantize(model) if kind == "int8" else model
            for pooling in POOLINGS if width == 60 else ("mean", "pooler"):
                options = {"tokenizer": tokenizer, "pooling": pooling, "normalize": pooling == "mean"}
                with threads(1):
                    alone = torch.stack([model.encode(text, **options) for text in texts])
                assert alone.isfinite().all()
                for count, batch_tokens in ((1, 64), (2, 8192), (3, 300), (2, 150)):
                    order = torch.randperm(len(texts), generator=generator)[: 5 + 3 * count].tolist()
                    with threads(count):
                        vectors = model.encode([texts[i] for i in order], batch_tokens=batch_tokens, **options)
                    same = (vectors == alone[order]).all(1)
                    assert same.all(), f"{kind}, {width}, {pooling}, {count} threads: {(~same).nonzero().flatten()}"
        compared.append(kind)
    return compared


@pytest.mark.skipif(not extensions.registered("bert_fast::linear_tiles", "CPU"), reason="the CPU kernels are not built")
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(extensions.cpu_isa()) + 1])
def test_a_texts_vector_has_the_same_bits_in_every_batch(tmp_path: Path, isa: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        # Threads that spin would wait for each other where there are fewer cores.
        env={**os.environ, "BERT_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compared = done.stdout.split()
    # INT8's encoder is ours everywhere; its pooler is a float32 product, which the baseline leaves to the BLAS.
    expected = {"generic": {"bfloat16"}, "avx2": {"float32", "bfloat16", "int8"}}.get(isa, {"float32", "int8"})
    assert expected <= set(compared), compared


if __name__ == "__main__":
    print(*check(Path(sys.argv[1])))
