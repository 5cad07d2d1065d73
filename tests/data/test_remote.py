"""Prepared folders at URLs: written with the manifest last, read through a verified copy, or in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from bert_fast import _io
from bert_fast.cli.main import main
from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, local_folder, prepare, remote
from bert_fast.data.shards import TokenStore, read_manifest

URL = "memory://bucket/corpora/data"


@pytest.fixture
def store(prepared: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """An in-memory file system with the prepared folder at `URL`."""
    files = fsspec.filesystem("memory")
    remote.upload(prepared, URL)
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def opened(folder: str, cache: Path) -> PretrainingData:
    return PretrainingData(PretrainingDataConfig(folder, cache=str(cache), seq_len=48, token_budget=400))


def test_batches_of_a_url_are_those_of_the_folder(prepared, store, tmp_path):
    remote_data, local_data = opened(URL, tmp_path), opened(str(prepared), tmp_path)
    for batch, expected in zip(remote_data.batches(0), local_data.batches(0), strict=True):
        np.testing.assert_array_equal(batch.input_ids, expected.input_ids)
    [copy] = tmp_path.iterdir()
    assert read_manifest(copy) == read_manifest(prepared)


def test_pretraining_reads_a_url(store, tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = ["--output_dir", str(tmp_path / "run"), "--steps", "2", "--eval_batches", "1", "--tensorboard", "false"]
    data = ["--data.folder", URL, "--data.seq_len", "48", "--data.token_budget", "128"]
    assert main(["pretrain", *run, *data, "--model.config", str(tiny_config), "--progress", "false"]) == 0
    assert "held-out" in capsys.readouterr().out
    assert len(list((tmp_path / "cache" / "bert_fast" / "data").iterdir())) == 1


def test_files_are_downloaded_once_and_again_only_if_missing(store, tmp_path, monkeypatch):
    fetched = []
    get = store.get_file

    def counted(source: str, target: str) -> None:
        fetched.append(source.removeprefix("/bucket/corpora/data/"))
        get(source, target)

    monkeypatch.setattr(type(store), "get_file", staticmethod(counted))
    folder = local_folder(URL, tmp_path)
    assert sorted(fetched) == sorted(read_manifest(folder)["files"])
    fetched.clear()
    assert local_folder(URL, tmp_path) == folder
    assert fetched == []
    leftover = _io.temporary_path(folder / "train/00001.arrow")
    leftover = leftover.with_name(leftover.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above the largest PID
    leftover.write_bytes(b"of a killed process")
    (folder / "train/00001.arrow").unlink()
    with (folder / "vocab.txt").open("ab") as file:
        file.write(b"extra")
    local_folder(URL, tmp_path)
    assert sorted(fetched) == ["train/00001.arrow", "vocab.txt"]
    assert not leftover.exists()


def test_a_file_url_is_read_in_place(prepared, tmp_path):
    assert local_folder(f"file://{prepared}", tmp_path) == prepared
    assert local_folder(prepared, tmp_path) == prepared
    assert opened(f"file://{prepared}", tmp_path).tokens == TokenStore(prepared, "train").tokens
    assert list(tmp_path.iterdir()) == [], "no copy is made of local shards"


def test_a_corrupt_file_is_named_and_not_copied(store, tmp_path):
    name = "train/00001.arrow"
    content = bytearray(store.cat_file(f"{URL}/{name}"))
    content[len(content) // 2] ^= 1
    store.pipe_file(f"{URL}/{name}", bytes(content))
    with pytest.raises(ValueError, match=rf"{URL}/{name} is corrupt \(its size or SHA-256 differs from its manifest\)"):
        local_folder(URL, tmp_path)
    assert not list(tmp_path.glob("*/train/00001.arrow*"))
    store.rm_file(f"{URL}/{name}")
    with pytest.raises(ValueError, match=rf"{URL}/{name} is missing"):
        local_folder(URL, tmp_path)


def test_a_url_without_a_folder_is_refused_with_a_hint(tmp_path):
    with pytest.raises(ValueError, match=r"memory://bucket/nothing is not a prepared data folder .* bert-fast prepare"):
        local_folder("memory://bucket/nothing", tmp_path)
    with pytest.raises(ValueError, match="nosuch://x can't be opened: Protocol not known"):
        local_folder("nosuch://x", tmp_path)


def test_sources_and_output_can_be_urls(text_file, store, tmp_path):
    store.pipe_file("memory://bucket/text/corpus.txt", text_file.read_bytes())
    settings = {"vocab_size": 200, "min_characters": 1, "part_bytes": 2**14, "progress": False}

    def remotely(**changes: object) -> PrepareConfig:
        where = {"output": "memory://bucket/output", "work": str(tmp_path / "work")}
        return PrepareConfig(**{**where, "sources": ["memory://bucket/text/*.txt"], **settings, **changes})

    prepare(remotely())
    prepare(PrepareConfig(str(tmp_path / "local"), [str(text_file)], **settings))
    copy = local_folder("memory://bucket/output", tmp_path / "cache")
    ours, local = read_manifest(copy), read_manifest(tmp_path / "local")
    assert ours["files"] == local["files"]
    assert not (tmp_path / "work").exists()
    with pytest.raises(ValueError, match="memory://bucket/output is a prepared data folder already; use it, or pass"):
        prepare(remotely())
    with pytest.raises(ValueError, match="memory://bucket/text exists and is not a prepared data folder"):
        prepare(remotely(output="memory://bucket/text", overwrite=True))
    prepare(remotely(overwrite=True, vocab_size=150))
    assert read_manifest(local_folder("memory://bucket/output", tmp_path / "cache"))["vocab_size"] == 150


def test_an_incomplete_folder_is_not_a_prepared_one(prepared, store, monkeypatch, tmp_path):
    put, written = store.put_file, []

    def failing(source: str, target: str) -> None:
        if len(written) == 3:
            raise OSError("connection lost")
        written.append(target)
        put(source, target)

    monkeypatch.setattr(type(store), "put_file", staticmethod(failing))
    with contextlib.suppress(OSError):
        remote.upload(prepared, URL)
    with pytest.raises(ValueError, match="is not a prepared data folder"):
        local_folder(URL, tmp_path)
