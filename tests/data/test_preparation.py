"""`prepare`: the same files however it is run, in bounded memory, with counts of dropped documents."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bert_fast.data.selection as selection
from bert_fast._lock import exclusive
from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, prepare
from bert_fast.data.shards import TokenStore, read_manifest, verify_files


def settings(corpus: Path, output: Path, **changes: object) -> PrepareConfig:
    values = {
        "sources": [str(corpus)],
        "vocab_size": 300,
        "heldout_fraction": 0.2,
        "part_bytes": 3000,
        "shard_tokens": 500,
        "progress": False,
    }
    return PrepareConfig(**{"output": str(output), **values, **changes})


@pytest.fixture(scope="module")
def corpus(documents: Callable[..., list[list[str]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several formats, some compressed, with copies and with documents that are dropped."""
    folder = tmp_path_factory.mktemp("mixed")
    texts = documents(60, seed=3)
    (folder / "a.txt").write_text("\n\n".join("\n".join(document) for document in texts[:25]) + "\n\nTiny.\n")
    rows = [json.dumps({"text": " ".join(document)}) for document in texts[20:40]]
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join([*rows, '{"text": null}', "{not json"]))
    last = "\n\n".join("\n".join(document) for document in texts[40:])
    (folder / "c.txt").write_bytes(last.encode() + b"\n\nb\xe9t and more\n")
    return folder


@pytest.fixture(scope="module")
def once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus`, prepared without interruption by one process."""
    folder = tmp_path_factory.mktemp("once") / "data"
    prepare(settings(corpus, folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_workers_give_the_same_files(corpus, once, tmp_path):
    prepare(settings(corpus, tmp_path / "data", workers=2))
    assert contents(tmp_path / "data") == contents(once)
    assert [path.name for path in tmp_path.iterdir()] == ["data"], "the work folder is gone"
    assert len(list(once.glob("train/*.arrow"))) > 8


KILLED = """
import contextlib, os, signal
from bert_fast.data import PrepareConfig, prepare, parts
count = 0
finish = parts.finished_folder
@contextlib.contextmanager
def stop(folder):
    global count
    count += 1
    with finish(folder) as temporary:
        if count == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        yield temporary
parts.finished_folder = stop
prepare(PrepareConfig(**{config!r}))
"""


def test_a_killed_preparation_resumes_with_its_finished_parts(corpus, once, tmp_path, monkeypatch):
    output, work = tmp_path / "data", tmp_path / ".data.work"
    config = vars(settings(corpus, output))
    for at in (3, 4):  # the second run finishes three parts more than the first
        done = subprocess.run([sys.executable, "-c", KILLED.format(at=at, config=config)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not output.exists()
    finished = sorted(work.glob("clean-*[!p]"))
    assert len(finished) == 5
    assert len(list(work.glob("*.tmp"))) == 1
    times = {path.name: (path / "counts.json").stat().st_mtime_ns for path in finished}
    # The work folder stays, to show that finished parts are not written again.
    monkeypatch.setattr("bert_fast.data.preparation.shutil.rmtree", lambda *_, **__: None)
    prepare(settings(corpus, output))
    [work] = tmp_path.glob("..data.work.*.tmp")
    assert {name: (work / name / "counts.json").stat().st_mtime_ns for name in times} == times
    assert contents(output) == contents(once)


def test_a_kill_of_two_workers_leaves_no_process_and_the_next_run_resumes(corpus, once, tmp_path):
    config = vars(settings(corpus, tmp_path / "data", workers=2))
    code = f"from bert_fast.data import PrepareConfig, prepare\nprepare(PrepareConfig(**{config!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    work = tmp_path / ".data.work"
    deadline = time.monotonic() + 60
    while not list(work.glob("clean-*[!p]")):
        assert process.poll() is None, "the process ended before the test could kill it"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # a process of its group is alive
            time.sleep(0.05)
        pytest.fail("workers outlive the process that started them")
    prepare(settings(corpus, tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(once)


def test_a_changed_source_is_read_again(documents, tmp_path):
    path = tmp_path / "a.txt"
    texts = ["\n".join(document) for document in documents(30)]
    path.write_text("\n\n".join(texts))
    with pytest.raises(ValueError, match="vocab_size is 5; expected at least"):
        prepare(settings(path, tmp_path / "data", vocab_size=5))
    assert len(list((tmp_path / ".data.work").glob("clean-*"))) > 2, "cleaned parts are kept"
    path.write_text("\n\n".join(reversed(texts)))
    for name in ("data", "fresh"):
        prepare(settings(path, tmp_path / name))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_second_preparation_of_the_same_folder_is_refused(corpus, tmp_path):
    with (
        exclusive(tmp_path / ".data.work", what="bert-fast prepare"),
        pytest.raises(ValueError, match=r"another bert-fast prepare \(host .*, pid .*\) is at work in .*\.data\.work"),
    ):
        prepare(settings(corpus, tmp_path / "data"))


def test_a_finished_work_folder_is_renamed_before_it_is_deleted(corpus, tmp_path, monkeypatch):
    """A preparation killed while it deletes its work folder leaves none that is half there to resume from."""

    remove = shutil.rmtree

    def killed(path: Path, **options: bool) -> None:
        if not path.name.startswith("..data.work"):
            remove(path, **options)
            return
        remove(next(path.glob("vocabulary-*")))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bert_fast.data.preparation.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings(corpus, tmp_path / "data"))
    assert not (tmp_path / ".data.work").exists()
    prepare(settings(corpus, tmp_path / "data", overwrite=True))


def test_the_report_counts_dropped_documents_by_reason(corpus, once, capsys, tmp_path):
    report = json.loads((once / "report.json").read_text())
    assert report["read"] == 60 + 5 + 4, "five documents are in two files, and four are broken"
    near_empty = report["dropped"].pop("near_empty")
    assert report["dropped"] == {"undecodable": 1, "malformed": 1, "missing": 1}
    assert report["kept"] == report["read"] - 3 - near_empty
    assert report["kept"] == sum(counts["documents"] for counts in report["splits"].values())
    assert "b.jsonl.gz, line 22: not JSON" in report["first_dropped"]["malformed"]
    assert "c.txt" in report["first_dropped"]["undecodable"]
    assert report["unknown"] == 0
    printed = prepare(settings(corpus, tmp_path / "data", progress=True))
    out = capsys.readouterr().out
    assert str(printed) in out
    assert f"read 69 documents, kept {report['kept']}" in out
    assert "dropped 1: not UTF-8 (first: " in out


def test_a_corpus_without_documents_is_refused_with_the_reasons(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe und Länge.\n\nKürze.\n\nTiny.\n".encode("latin-1"))
    message = r"no documents: 3 read and dropped \(not UTF-8, first .*a\.txt, line 1: .*; fewer characters .*line 5"
    with pytest.raises(ValueError, match=message):
        prepare(settings(tmp_path / "a.txt", tmp_path / "data"))


def test_errors_raise_on_request(corpus, tmp_path):
    message = r"b\.jsonl\.gz, line 21: the value is null; expected text .*; errors='drop' drops"
    with pytest.raises(ValueError, match=message):
        prepare(settings(corpus, tmp_path / "data", errors="raise"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("bucket", [2**23, 7], ids=["at-once", "in-buckets"])
def test_duplicates_are_dropped_but_for_the_first(corpus, once, tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(selection, "_BUCKET", bucket)
    report = prepare(settings(corpus, tmp_path / "data", drop_duplicates=True))
    before = json.loads((once / "report.json").read_text())
    texts = [document for split in ("train", "heldout") for document in documents_of(once, split)]
    kept = [document for split in ("train", "heldout") for document in documents_of(tmp_path / "data", split)]
    assert report.dropped["duplicate"] == before["kept"] - len(kept) == len(texts) - len(set(texts)) > 0
    assert len(kept) == len(set(kept))
    assert set(kept) == set(texts)


def documents_of(folder: Path, split: str) -> list[str]:
    """The text of each document, decoded."""
    from bert_fast.data import load_tokenizer

    store, tokenizer = TokenStore(folder, split), load_tokenizer(folder)
    ends = store.sentence_ends[store.document_sentences[1:] - 1]
    starts = np.concatenate([[0], ends[:-1]])
    return [
        tokenizer.decode(store.gather(np.array([i]), np.array([j - i])).tolist())
        for i, j in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_max_documents_are_the_first_ones(corpus, once, tmp_path, workers):
    prepare(settings(corpus, tmp_path / "data", max_documents=17, workers=workers, vocab=str(once)))
    counts = [len(documents_of(tmp_path / "data", split)) for split in ("train", "heldout")]
    assert sum(counts) == 17
    first = set(documents_of(tmp_path / "data", "train"))
    assert first <= set(documents_of(once, "train")[:30])


def test_a_vocabulary_of_a_sample_is_the_same_for_any_number_of_parts(corpus, tmp_path):
    sizes = {"few": 10**6, "many": 2000}
    for name, part_bytes in sizes.items():
        prepare(settings(corpus, tmp_path / name, vocab_characters=4000, part_bytes=part_bytes))
    few, many = (tmp_path / name / "vocab.txt" for name in sizes)
    assert few.read_bytes() == many.read_bytes()


PEAK = """
import resource, sys
from bert_fast.data import PrepareConfig, prepare
prepare(PrepareConfig({output!r}, [{source!r}], vocab={vocab!r}, shard_tokens=2**17, progress=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def test_memory_does_not_grow_with_the_corpus(documents, once, tmp_path):
    """With a compressed file, which can't be cut into parts, of 1 MB and of 10 MB of text."""
    lines = [json.dumps({"text": document}) + "\n" for document in documents(400, seed=5)]
    generator = random.Random(0)
    peaks = []
    for name, size in (("small", 1e6), ("large", 10e6)):
        written = 0
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            while written < size:
                written += file.write("".join(generator.sample(lines, 100)))
        code = PEAK.format(output=str(tmp_path / name), source=str(tmp_path / f"{name}.jsonl.gz"), vocab=str(once))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    tokens = read_manifest(tmp_path / "large")["splits"]["train"]["tokens"]
    assert tokens * 4 > 15e6, "the tokens alone exceed the allowed growth"
    assert peaks[1] - peaks[0] < 8, f"peak memory is {peaks} MB"


def test_batches_are_read_from_the_prepared_folder(once):
    verify_files(once, checksums=True)
    data = PretrainingData(PretrainingDataConfig(str(once), seq_len=32, token_budget=256))
    assert sum(batch.num_tokens for batch in data.batches(0)) > 5000
