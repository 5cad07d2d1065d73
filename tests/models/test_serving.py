"""A server: thousands of batches, two models, several threads, and forked or spawned processes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bert_fast.kernels.linear import cpu_backends
from bert_fast.kernels.linear_int8 import cpu_backends as int8_backends
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.embedding import pack

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
MODEL = f"""
import gc, multiprocessing, os, random, sys
import bert_fast, torch
from bert_fast.models import BertConfig, BertModel
from bert_fast.models.embedding import pack

SIZES = {SIZES!r}

def model_of(seed):
    torch.manual_seed(seed)
    return BertModel(BertConfig(vocab_size=50, **SIZES)).eval()

def run(model, lengths):
    with torch.inference_mode():
        return model(**pack([[5 + i % 45 for i in range(length)] for length in lengths])).last_hidden_state
"""
# MB. A tensor of one element kept per batch makes 4.4 (measured); without a leak it is 0.0, or a page or two.
GROWTH = 1.0
# MB over 2,000 new numbers of tokens. What malloc keeps varies by 1 to 2; four oneDNN products take 127 (measured).
GROWTH_OF_LENGTHS = 10.0
MEMORY = """
def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
"""
BATCHES = """
draw = random.Random(0)
models = model_of(0), model_of(1)
for model in models:
    bert_fast.quantize(model, "int8") if sys.argv[1] == "int8" else model.to(getattr(torch, sys.argv[1]))
def batches(count):
    for number in range(count):
        run(models[number % 2], [draw.randint(1, 24) for _ in range(draw.randint(1, 6))])

# The row buckets (_common/row_buckets.py) of oneDNN's products, which random batches meet one by one for a long time.
# One number in four: were anything kept for each, the other three would show (with oneDNN's primitives, 17 MB: tried).
for tokens in range(4, 6 * 24 + 1, 4):
    for model in models:
        run(model, [24] * (tokens // 24) + [tokens % 24] * (tokens % 24 > 0))
batches(2000)
before = resident()
batches(8000)
print(resident() - before)
"""
# Without the pooler, whose product is torch's: oneDNN keeps 0.6 MB for each number of sequences in bfloat16.
NEW_LENGTHS = """
model = BertModel(BertConfig(vocab_size=50, **SIZES), add_pooling_layer=False).eval()
bert_fast.quantize(model, "int8") if sys.argv[1] == "int8" else model.to(getattr(torch, sys.argv[1]))
def batches(sizes):
    for tokens in sizes:
        run(model, [24] * (tokens // 24) + [tokens % 24] * (tokens % 24 > 0))

sizes = random.Random(0).sample(range(1, 3000), 2500)
batches([3000, *sizes[:500]])  # until the pieces that malloc keeps have all sizes: 1 to 2 MB
before = resident()
batches(sizes[500:])
print(resident() - before)
"""
PROCESSES = """
def child(pipe):
    pipe.send(run(model_of(0), [9, 3, 60, 40]).tolist())
    pipe.send(torch.get_num_threads())

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = run(model_of(0), [9, 3, 60, 40])
    torch.randn(512, 512) @ torch.randn(512, 512)
    context = multiprocessing.get_context(sys.argv[1])
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,), daemon=True)
    process.start()
    assert here.poll(90), "the child hangs"
    torch.testing.assert_close(torch.tensor(here.recv()), expected)
    print("threads", here.recv())
    process.join(30)
    again = run(model_of(0), [9, 3, 60, 40])
    assert torch.equal(again, expected) and torch.get_num_threads() == 2
"""


def python(code: str, tmp_path: Path, *arguments: str, threads: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"  # spawn reads it again
    script.write_text(MODEL + code)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_ten_thousand_batches_of_random_lengths_do_not_grow_the_memory(kind: str, tmp_path: Path) -> None:
    growth = float(python(MEMORY + BATCHES, tmp_path, kind, threads=1).stdout)
    assert growth < GROWTH, f"{growth:.2f} MB"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_number_of_tokens_that_is_new_takes_no_memory(kind: str, tmp_path: Path) -> None:
    """Nothing is made for a number of rows, where the products are ours."""
    backend = int8_backends.BACKEND if kind == "int8" else cpu_backends.BACKENDS[getattr(torch, kind)].inference
    if backend == "tiles":
        growth = float(python(MEMORY + NEW_LENGTHS, tmp_path, kind, threads=1).stdout)
        assert growth < GROWTH_OF_LENGTHS, f"{growth:.2f} MB"


@pytest.mark.parametrize(("method", "threads"), [("fork", 1), ("spawn", 2)])
def test_a_process_started_while_threads_run_computes_the_same(method: str, threads: int, tmp_path: Path) -> None:
    done = python(PROCESSES, tmp_path, method, threads=2)
    assert f"threads {threads}" in done.stdout
    assert ("computes with 1 thread" in done.stderr) == (method == "fork")


def test_threads_that_share_a_model_get_the_same_bits() -> None:
    torch.manual_seed(0)
    models = [BertModel(BertConfig(vocab_size=50, **SIZES)).eval() for _ in range(2)]
    batches = [pack([[5 + i % 45 for i in range(3 + 7 * k)] for k in range(1 + n)]) for n in range(6)]

    def run(number: int) -> torch.Tensor:
        with torch.inference_mode():
            return models[number % 2](**batches[number % 6]).last_hidden_state

    expected = [run(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for number, hidden in enumerate(pool.map(run, range(120))):
            assert torch.equal(hidden, expected[number % 6]), number
