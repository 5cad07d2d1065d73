"""Time kernels and models, checked against float64 in the same run, and compare what was recorded.

`bert-fast bench kernels` times the ops, `bench model` a model in a folder, `bench compare` marks what got slower
between two files, `bench export` writes an op for other benchmarks. docs/benchmarks.md describes the files.
"""

from __future__ import annotations

SUBCOMMANDS = {
    "kernels": "time the implementations of ops, and their peers",
    "model": "time a model in a folder beside transformers",
    "compare": "compare two or more recorded files; exit code 1 where the last is slower",
    "export": "write an op as a FlashInfer-Trace definition or a Benchmark of Hugging Face's kernels",
}
