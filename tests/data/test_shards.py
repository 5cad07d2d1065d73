"""Prepared folders: complete or absent, and damage is detected."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, load_tokenizer, prepare
from bert_fast.data.shards import TokenStore, read_manifest, sha256, verify_files


@pytest.fixture
def damaged(prepared: Path, tmp_path: Path) -> Path:
    """A copy for a test to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def small(text_file: Path, folder: Path, **changes: object) -> PrepareConfig:
    values = {"sources": [str(text_file)], "vocab_size": 200, "progress": False, "heldout_fraction": 0.1}
    values["min_characters"] = 1
    return PrepareConfig(**{"output": str(folder), **values, **changes})


def test_the_manifest_counts_and_checks_every_file(prepared):
    manifest = read_manifest(prepared)
    names = {path.relative_to(prepared).as_posix() for path in prepared.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert len([name for name in names if name.startswith("train/")]) > 2, "expected several shards"
    for name, expected in manifest["files"].items():
        assert expected == {"bytes": (prepared / name).stat().st_size, "sha256": sha256(prepared / name)}
    for split, counts in manifest["splits"].items():
        tables = [pa.ipc.open_file(path).read_all() for path in sorted((prepared / split).glob("*.arrow"))]
        rows = [row for table in tables for row in table.to_pylist()]
        assert counts["documents"] == len(rows)
        assert counts["tokens"] == sum(len(row["tokens"]) for row in rows)
        assert counts["sentences"] == sum(len(row["sentence_ends"]) for row in rows)
        assert all(row["sentence_ends"][-1] == len(row["tokens"]) for row in rows)


def test_the_store_has_the_text_in_order(prepared, text_file):
    tokenizer = load_tokenizer(prepared)
    read = []
    for split in ("train", "heldout"):
        store = TokenStore(prepared, split)
        starts = np.concatenate([[0], store.sentence_ends[:-1]])
        sentences = [
            tokenizer.decode(store.gather(np.array([start]), np.array([end - start])).tolist())
            for start, end in zip(starts, store.sentence_ends, strict=True)
        ]
        first = store.document_sentences.tolist()
        read.append([sentences[i:j] for i, j in pairwise(first)])
    documents = [document.split("\n") for document in text_file.read_text().lower().strip().split("\n\n")]
    heldout = [document for document in documents if document in read[1]]
    assert read[1] == heldout
    assert read[0] == [document for document in documents if document not in heldout]
    assert len(heldout) == 7


def test_preparing_again_gives_the_same_files(text_file, tmp_path):
    for name in ("first", "second"):
        prepare(small(text_file, tmp_path / name))
    first, second = (read_manifest(tmp_path / name)["files"] for name in ("first", "second"))
    assert first == second


def test_an_existing_folder_is_kept_unless_overwrite_is_true(text_file, tmp_path):
    output = tmp_path / "data"
    prepare(small(text_file, output))
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="is a prepared data folder already; use it, or pass overwrite=true"):
        prepare(small(text_file, output, vocab_size=150))
    assert (output / "manifest.json").read_bytes() == before
    report = prepare(small(text_file, output, vocab_size=150, overwrite=True))
    assert report.vocab_size == 150
    assert read_manifest(output)["vocab_size"] == 150
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_contents_is_never_replaced(text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not a prepared data folder; choose another output"):
        prepare(small(text_file, tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_kill_leaves_no_folder_and_the_next_run_succeeds(text_file, tmp_path):
    output = tmp_path / "data"
    code = f"""
import os, signal
from bert_fast.data import PrepareConfig, prepare
import bert_fast.data.preparation as module
module.write_manifest = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # after the shards
prepare(PrepareConfig(output={str(output)!r}, sources=[{str(text_file)!r}], vocab_size=200, progress=False))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    prepare(small(text_file, output))
    verify_files(output, checksums=True)
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "unfinished folders are removed"


def open_train(folder: Path, checksums: bool = True) -> PretrainingData:
    return PretrainingData(PretrainingDataConfig(str(folder), checksums=checksums))


def test_a_missing_shard_is_named(damaged):
    (damaged / "train/00001.arrow").unlink()
    with pytest.raises(ValueError, match=r"train/00001\.arrow is missing"):
        open_train(damaged, checksums=False)


def test_a_truncated_shard_is_named(damaged):
    path = damaged / "train/00001.arrow"
    size = path.stat().st_size
    os.truncate(path, size - 8)
    with pytest.raises(
        ValueError, match=rf"train/00001\.arrow has {size - 8} bytes; expected {size}, as in its manifest"
    ):
        open_train(damaged, checksums=False)


@pytest.mark.parametrize("name", ["train/00001.arrow", "vocab.txt", "tokenizer.json"])
def test_a_flipped_bit_is_found_and_named(damaged, name):
    data = bytearray((damaged / name).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is corrupt \(its SHA-256 differs from its manifest\)"):
        open_train(damaged)


def test_a_shard_that_is_not_an_arrow_file_is_named_without_checksums(damaged):
    path = damaged / "train/00000.arrow"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"train/00000\.arrow is corrupt"):
        open_train(damaged, checksums=False)


@pytest.mark.parametrize(
    ("tokens", "ends", "message"),
    [
        ([7, 8, 9], [1, 2], "do not end where the document ends"),
        ([7, 8, 9], [2, 2, 3], "do not increase"),
        ([7, 8, 9], [], "do not end where the document ends"),
        ([7, 8, 400], [1, 3], "token id 400; expected 0 to 399"),
        ([7, -8, 9], [1, 3], "token id -8; expected 0 to 399"),
    ],
    ids=["too-short", "repeated", "no-sentence", "above-the-vocabulary", "negative"],
)
def test_inconsistent_rows_are_named(damaged, tokens, ends, message):
    path = damaged / "train/00000.arrow"
    schema = pa.ipc.open_file(path).schema
    with pa.ipc.new_file(path, schema) as file:
        file.write_batch(pa.record_batch([[[5, 6], tokens], [[1, 2], ends]], schema=schema))
    manifest = read_manifest(damaged)
    manifest["files"]["train/00000.arrow"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"train/00000\.arrow.*{message}"):
        open_train(damaged)


def test_a_manifest_with_other_counts_is_refused(damaged):
    manifest = read_manifest(damaged)
    manifest["splits"]["train"]["tokens"] += 1
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="as in its manifest"):
        open_train(damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "manifest.json is not valid JSON"),
        ("[1]", r"manifest.json is \[1\]; expected an object: prepare"),
        (
            '{"schema_version": 99, "files": {}, "splits": {}, "vocab_size": 5}',
            "schema version 99; expected 2: prepare the data again",
        ),
    ],
    ids=["truncated", "a-list", "future-version"],
)
def test_a_broken_manifest_is_named(damaged, text, message):
    (damaged / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_train(damaged)


def test_a_missing_folder_is_refused_with_a_hint(tmp_path):
    with pytest.raises(ValueError, match=r"is not a prepared data folder .* make one with bert-fast prepare"):
        open_train(tmp_path / "none")


def test_nothing_held_out(text_file, tmp_path):
    report = prepare(small(text_file, tmp_path / "data", heldout_fraction=0.0))
    assert report.splits["heldout"] == {"documents": 0, "sentences": 0, "tokens": 0}
    assert report.splits["train"]["documents"] == 80
    with pytest.raises(ValueError, match="heldout: 0 documents; expected at least 2"):
        PretrainingData(PretrainingDataConfig(str(tmp_path / "data"), split="heldout"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the corpus has no documents"), ("One.\n\nTwo.\n\nThree.\n", "3 different documents; expected at least 4")],
    ids=["empty", "too-few"],
)
def test_a_corpus_that_is_too_small_is_refused(tmp_path, text, message):
    (tmp_path / "few.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(small(tmp_path / "few.txt", tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_copies_of_a_document_are_in_one_split(tmp_path):
    documents = [f"word {'a' * i} first.\nAnd {'b' * i} second." for i in range(1, 11)]
    (tmp_path / "twice.txt").write_text("\n\n".join(documents * 2))
    prepare(small(tmp_path / "twice.txt", tmp_path / "data", heldout_fraction=0.3))
    counts = read_manifest(tmp_path / "data")["splits"]
    assert counts["train"]["documents"] + counts["heldout"]["documents"] == 20
    assert counts["heldout"]["documents"] in (4, 6, 8), "copies are in both splits"


def test_the_report_counts(text_file, tmp_path, capsys):
    report = prepare(small(text_file, tmp_path / "data", progress=True))
    documents = sum(counts["documents"] for counts in report.splits.values())
    assert documents == 80
    assert "vocabulary of 200 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0; expected 0 or more and less than 1"),
        ({"shard_tokens": 0}, "shard_tokens is 0; expected 1 or more"),
        ({"max_documents": 0}, "max_documents is 0; expected 1 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"words": "jieba"}, "words is 'jieba'; expected one of pieces, spaces, rjieba"),
        ({"language": "English"}, "language is 'English'; expected a code such as 'en'"),
        ({"sources": []}, r"sources is \[\]; expected a list"),
        ({"sources": "builtin"}, "sources is 'builtin'; expected a list"),
        ({"output": "memory://data"}, "output is the URL memory://data, which requires work, a local folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "a.txt", tmp_path / "data", **changes)
