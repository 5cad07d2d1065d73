"""Bad rows, damaged files, loops of links and hostile manifests: counted, named or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, local_folder, prepare, train_vocab
from bert_fast.data.shards import TokenStore
from bert_fast.data.sources import find_files
from bert_fast.data.tokens import Encoder

GOOD = ["the cat sat on the mat.", "a dog ran to the red house.", "birds sing in the old tree."]


def settings(output: Path, *sources: Path, **changes: object) -> PrepareConfig:
    values = {"vocab_size": 60, "min_characters": 1, "heldout_fraction": 0.0, "progress": False, **changes}
    return PrepareConfig(str(output), [str(source) for source in sources], **values)


BAD_ROWS = {
    "digits": b'{"text": ' + b"7" * 5000 + b"}",
    "nested": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "surrogate": b'{"text": "a \\ud800 b"}',
    "key": b'{"\\udfff": "a"}',
    "number": b'{"text": 3}',
    "null": b'{"text": null}',
    "list": b'[["a"]]',
    "bytes": b'{"text": "\xff\xfe"}',
    "infinite": b'{"text": 1e99999}',
    "cut": b'{"text": "a',
    "mixed": b'{"text": ["a", 3, {"b": []}]}',
    "words": b'{"text": [["a", 3]]}',
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_one_bad_row_is_dropped_counted_and_named(tmp_path, row):
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good[0], row, *good[1:]]) + b"\n")
    report = prepare(settings(tmp_path / "data", tmp_path / "a.jsonl"))
    assert (report.read, report.kept) == (4, 3)
    [where] = report.first_dropped.values()
    assert "a.jsonl, line 2: " in where
    assert where.isprintable()
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*errors='drop' drops such documents"):
        prepare(settings(tmp_path / "other", tmp_path / "a.jsonl", errors="raise"))


def test_bad_rows_of_csv_are_dropped_and_the_rest_is_read(tmp_path):
    rows = ["text,n", "one two three,1", 'a "b" c,2,3', "four\u2028five six,4", '"y" z,5', "seven eight,6"]
    data = "\n".join(rows).encode() + b'\nnine\rten,7\neleven \xff,8\n"a ""b"" c",9\n"never closed,9\nx,10\n'
    (tmp_path / "a.csv").write_bytes(data)
    report = prepare(settings(tmp_path / "data", tmp_path / "a.csv"))
    assert report.dropped == {"undecodable": 1, "malformed": 4}
    assert report.kept == 4


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_damaged_anywhere_is_counted_and_named(tmp_path, suffix):
    (tmp_path / "a.txt").write_text("\n\n".join(GOOD))
    data = COMPRESS[suffix]("\n\n".join(f"text number {i} is here." for i in range(3000)).encode())
    generator = np.random.default_rng(0)
    for attempt in range(6):
        bad = bytearray(data)
        bad[int(generator.integers(0, len(bad)))] ^= 1 << int(generator.integers(0, 8))
        (tmp_path / f"b.txt{suffix}").write_bytes(bad if attempt else data[: len(data) // 2])
        sources = (tmp_path / "a.txt", tmp_path / f"b.txt{suffix}")
        report = prepare(settings(tmp_path / f"data{attempt}", *sources, vocab_size=900))
        assert report.kept >= 3
        if attempt == 0:
            assert report.dropped["damaged"] == 1
            assert f"b.txt{suffix}: can't be read to its end" in report.first_dropped["damaged"]
            with pytest.raises(ValueError, match=rf"b\.txt\{suffix}: can't be read to its end"):
                prepare(settings(tmp_path / "other", tmp_path / f"b.txt{suffix}", errors="raise"))


def test_a_decompression_bomb_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_fast.data.sources._ALWAYS_ALLOWED", 2**20)
    (tmp_path / "a.txt").write_text("\n\n".join(GOOD))
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"bomb.txt{suffix}").write_bytes(compress(b"a " * 2**24))
        (tmp_path / f"fine.txt{suffix}").write_bytes(compress(b"a sentence again and again.\n\n" * 2**13))
    report = prepare(settings(tmp_path / "data", tmp_path / "a.txt", *sorted(tmp_path.glob("bomb*"))))
    assert (report.kept, report.dropped) == (3, {"damaged": 3})
    assert "bomb.txt.bz2: decompresses to more than" in report.first_dropped["damaged"]
    assert prepare(settings(tmp_path / "fine", *sorted(tmp_path.glob("fine*")))).kept == 3 * 2**13


def test_other_line_separators_are_characters_of_a_sentence(tmp_path):
    text = "one\u2028two\x85three\x0bfour\x0cfive\u2029six.\r\nseven eight.\r\n\r\nnine ten.\r\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text.split("\r\n\r\n")[0]}), encoding="utf-8")
    prepare(settings(tmp_path / "data", tmp_path / "a.txt"))
    assert np.diff(TokenStore(tmp_path / "data", "train").document_sentences).tolist() == [2, 1]
    report = prepare(settings(tmp_path / "lines", tmp_path / "a.jsonl", sentences="lines"))
    assert report.splits["train"]["sentences"] == 2


def test_links_that_loop_are_followed_once_and_said(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "corpus" / "inner"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("\n\n".join(GOOD))
    (folder / "b.txt").symlink_to(folder / "a.txt")
    for name in ("up", "again"):
        (folder / name).symlink_to(tmp_path / "corpus", target_is_directory=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "c.txt").write_text("more text here.")
    (tmp_path / "corpus" / "linked").symlink_to(outside, target_is_directory=True)
    expected = [str(folder / "a.txt"), str(tmp_path / "corpus/linked/c.txt")]
    with caplog.at_level(logging.WARNING, "bert_fast"):
        assert find_files(str(tmp_path / "corpus")) == expected
        assert caplog.text.count("is a link to a folder that it is in; it is not followed") == 2
        assert "1 paths lead to files that are read already" in caplog.text
        for pattern in ("corpus/**/*.txt", "c*s/**/[a-c].txt", "**/*.txt"):
            found = find_files(str(tmp_path / pattern))
            assert {os.path.realpath(name) for name in found} == {os.path.realpath(name) for name in expected}, pattern
            assert len(found) == 2
    (folder / ".hidden.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for pattern in ("corpus/**/a.txt", "**/a.txt", "corpus/*/a.txt"):
        assert find_files(pattern) == ["corpus/inner/a.txt"]


def test_a_file_name_that_is_not_unicode_is_named(tmp_path):
    path = os.fsencode(tmp_path) + b"/a\xff\x1b[2J.jsonl"
    Path(os.fsdecode(path)).write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in GOOD) + b"{\n")
    report = prepare(settings(tmp_path / "data", Path(os.fsdecode(path))))
    assert "a\\udcff\\u001b[2J.jsonl, line 4: not JSON" in report.first_dropped["malformed"]
    assert str(report).encode()


def test_huge_words_are_left_out_of_the_vocabulary():
    generator = np.random.default_rng(0)
    blob = "".join(generator.choice(list("qxzw0123456789"), 200_000))
    begin = time.process_time()
    tokens = train_vocab([*GOOD * 20, f"the {blob}, cat", "東京" * 200], vocab_size=120).get_vocab()
    assert time.process_time() - begin < 5.0, "it took 14 s to count the pairs of one such word"
    assert "cat" in tokens
    assert "東" in tokens, "every Chinese character is a word"
    assert not {"q", "x", "z", "5"} & tokens.keys()


@pytest.mark.parametrize("words", ["pieces", "spaces"])
def test_a_huge_sentence_is_tokenised_in_parts_to_the_same_tokens(tmp_path, monkeypatch, words):
    (tmp_path / "a.txt").write_text("\n\n".join(GOOD))
    prepare(settings(tmp_path / "data", tmp_path / "a.txt"))
    sentence = " ".join(GOOD * 40)
    documents = [[GOOD[0], sentence], [sentence, sentence[:50]]]

    def encode() -> list[tuple[list[int], list[int]]]:
        encoded = Encoder(tmp_path / "data/tokenizer.json", words).encode(documents)
        return [(tokens.tolist(), ends.tolist()) for tokens, ends in encoded]

    whole = encode()
    monkeypatch.setattr("bert_fast.data.tokens._LONGEST", 64)
    assert encode() == whole


def test_prepare_warns_of_a_short_vocabulary_and_of_unknown_tokens(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("\n\n".join(chr(0x4E00 + i) * 4 for i in range(300)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join(GOOD))
    prepare(settings(tmp_path / "short", tmp_path / "a.txt", alphabet_size=100, vocab_size=1000))
    expected = "the vocabulary has 105 tokens, vocab_size is 1000: of 300 different characters alphabet_size keeps 100"
    assert expected in caplog.text
    assert "66.7% of the tokens are [UNK]" in caplog.text
    caplog.clear()
    prepare(settings(tmp_path / "fine", tmp_path / "b.txt"))
    assert "[UNK]" not in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.txt").write_text("\n\n".join(GOOD * 9))
    prepare(settings(folder / "data", folder / "a.txt"))
    return folder / "data"


NAMES = ["../x", "/tmp/x", "train/../../x", "train\\..\\x", "a\0b", ".", "", "train/00000.arrow/",
         "train//00000.arrow", "evil.py", "train/x.arrow", "C:x", "./vocab.txt", "heldout/.hidden"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_manifest_that_names_another_file_is_refused_and_writes_nothing(folder, tmp_path, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["vocab.txt"]
    store = fsspec.filesystem("memory")
    store.pipe_file("/hostile/manifest.json", json.dumps(manifest).encode())
    cache = tmp_path / "deep" / "cache"
    with pytest.raises(ValueError, match=r"memory://hostile: manifest.json names the file .*prepare the data again"):
        local_folder("memory://hostile", cache)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


def test_no_flip_in_a_manifest_ends_in_anything_but_an_error_that_names_it(folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "data")
    data = (folder / "manifest.json").read_bytes()
    accepted, messages = 0, []
    generator = np.random.default_rng(0)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(generator.integers(0, 8))
        (target / "manifest.json").write_bytes(flipped)
        try:
            PretrainingData(PretrainingDataConfig(str(target), seq_len=24, token_budget=64))
            accepted += 1  # a setting, a version, another file or white space
        except ValueError as error:
            messages.append(str(error))
    assert [message for message in messages if "prepare" not in message and "manifest" not in message] == []
    assert accepted < 0.8 * len(data)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"vocab.txt": {}}},
        {"files": {"vocab.txt": 3}},
        {"files": []},
        {"splits": {"train": {"documents": "3", "sentences": 1, "tokens": 1}}},
        {"splits": {"train": []}},
        {"vocab_size": True},
        {"vocab_size": "60"},
        {"schema_version": None},
    ],
    ids=str,
)
def test_a_manifest_of_another_schema_is_named(folder, tmp_path, change):
    target = shutil.copytree(folder, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in change.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    (target / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json.*: prepare the data again"):
        PretrainingData(PretrainingDataConfig(str(target), seq_len=24, token_budget=64))
