"""The benchmark of real texts, with a tiny model and stand-ins: what is compared, refused, timed, written and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import encode_speed
from benchmarks.models.encode_speed import compare, exact_vectors, measure, paragraphs, table
from benchmarks.reports import plots
from benchmarks.runner import text_peers
from benchmarks.runner.cpu_peers import AbsentError, of_torch
from benchmarks.runner.text_peers import Embed, TextModel, TextPeer, ours, padded
from bert_fast.bench.devices import Cpu
from bert_fast.data import save_tokenizer, train_vocab
from bert_fast.models import BertConfig, BertModel

SENTENCES = ["the small cat runs near the old house", "a red bird sings quietly over the river", "then it sleeps again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_vocab(SENTENCES * 3, vocab_size=90)
    save_tokenizer(tokenizer, path)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **sizes)
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # with the usual 0.02 the vectors of all texts are nearly the same
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> TextModel:
    return TextModel(folder, tmp_path, max_seqlen=24)


def texts_of(count: int) -> list[str]:
    return [" ".join(SENTENCES[index % 3].split() * (1 + index % 4))[: 20 + 7 * index] for index in range(count)]


def test_a_smoke_run_is_recorded_and_drawn(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["bert_fast, fp32", "bert_fast, int8", "sentence-transformers, fp32", "llama.cpp"]
    flags = ["--smoke", "--model", str(folder), "--max-seqlen", "64", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["encode_speed", *flags, "--only", *only])
    monkeypatch.setattr(
        encode_speed, "started_alone", lambda *_: {"created_s": 1.0, "first_ms": 2.0, "peak_mbytes": 3.0}
    )
    assert encode_speed.main() == 0
    (file,) = tmp_path.glob("*/encode_speed.json")
    report = json.loads(file.read_text())
    assert report["environment"]["model"] == folder.name
    for case in ("20 texts, one call", "20 texts, a call each"):
        rows = {row["variant"]: row for row in report["rows"] if row["case"] == case}
        assert list(rows) == ["sentence-transformers, fp32", "llama.cpp, Q8_0, int8", *only[:2]]
        ours_fp32, int8 = rows["bert_fast, fp32"], rows["bert_fast, int8"]
        assert ours_fp32["cosine"] > 1 - 1e-6 > int8["cosine"] > 0.99
        assert ours_fp32["texts_per_s"] == pytest.approx(20e3 / ours_fp32["ms"])
        assert ours_fp32["tokens_per_s"] / ours_fp32["texts_per_s"] > 10
        assert (ours_fp32["created_s"], ours_fp32["peak_mbytes"]) == (1.0, 3.0)
        theirs = rows["sentence-transformers, fp32"]
        if find_spec("sentence_transformers"):
            assert theirs["cosine"] > 1 - 1e-6
            assert ours_fp32["ratio_to_best_peer"] == pytest.approx(theirs["ms"] / ours_fp32["ms"])
        else:
            assert "pip install sentence-transformers" in theirs["refused"]
        if not find_spec("llama_cpp"):
            assert "pip install llama-cpp-python" in rows["llama.cpp, Q8_0, int8"]["refused"]
    (drawn,) = plots.draw_folder(file.parent)
    assert "bert_fast, int8" in drawn.read_text()


def test_wrong_vectors_of_ours_are_refused_and_an_absent_peer_is_named(model: TextModel) -> None:
    def noisy(of: TextModel) -> Embed:
        right = ours("fp32", frozen=False)(of)
        return lambda texts: right(texts) + 0.1 * torch.randn(len(texts), 64)

    def absent(_: TextModel) -> Embed:
        raise AbsentError("not installed: pip install it")

    def shuffled(of: TextModel) -> Embed:
        right = ours("fp32", frozen=False)(of)
        return lambda texts: right(texts[::-1])

    peers = [
        TextPeer("bert_fast", "fp32", ours("fp32", frozen=False)),
        TextPeer("bert_fast noisy", "fp32", noisy),
        TextPeer("bert_fast shuffled", "int8", shuffled),
        TextPeer("other", "fp32", absent),
        TextPeer("noisy", "fp32", noisy),
    ]
    rows = measure(model, texts_of(12), peers, Cpu(), 0.01, in_processes=False)
    by_name = {row.variant: row for row in rows}
    assert by_name["bert_fast, fp32"].ms
    assert by_name["noisy, fp32"].ms, "a peer is shown with its cosine"
    for name in ("bert_fast noisy, fp32", "bert_fast shuffled, int8"):
        assert by_name[name].refused.startswith("wrong: a mean cosine of 0.")
        assert by_name[name].ms is None
    assert by_name["other, fp32"].refused == "AbsentError: not installed: pip install it"
    assert len(encode_speed.failures(rows)) == 4, "in both cases"
    assert "refused: AbsentError" in table(rows)


def test_ours_is_compared_with_peers_of_its_precision_or_a_higher_one(model: TextModel) -> None:
    seconds = {"slow": 0.03, "fast": 0.01}

    def waiting(name: str) -> Any:
        def make(of: TextModel) -> Embed:
            right = ours("fp32", frozen=False)(of)

            def embed(texts: list[str]) -> Tensor:
                encode_speed.time.sleep(seconds[name])
                return right(texts)

            return embed

        return make

    peers = [
        TextPeer("a", "fp32", waiting("slow")),
        TextPeer("b", "int8", waiting("fast")),
        TextPeer("bert_fast", "fp32", ours("fp32", frozen=False)),
        TextPeer("bert_fast", "int8", ours("fp32", frozen=False)),
    ]
    rows = {row.variant: row for row in measure(model, texts_of(3), peers, Cpu(), 0.1, in_processes=False)}
    for label, rival in (("bert_fast, fp32", "a, fp32"), ("bert_fast, int8", "b, int8")):
        assert rows[label].ratio_to_best_peer == pytest.approx(rows[rival].ms / rows[label].ms)  # type: ignore[operator]


def test_what_users_write_around_a_runtime_gives_our_vectors(model: TextModel) -> None:
    texts = [*texts_of(70), "cat " * 60]
    theirs = padded(of_torch(model.forms.model), model)(texts)
    torch.testing.assert_close(theirs, ours("fp32", frozen=False)(model)(texts), rtol=0.0, atol=1e-5)
    exact = exact_vectors(model, texts)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(theirs.double(), exact, rtol=0.0, atol=1e-5)
    assert compare(TextPeer("it", "fp32", lambda _: lambda _: theirs[:3]), model, texts, exact).refused.startswith(
        "wrong: vectors of shape (3, 64)"
    )


def test_a_variant_alone_runs_in_a_process_of_its_own(model: TextModel) -> None:
    peer = next(peer for peer in text_peers.OURS if peer.label == "bert_fast, fp32")
    figures = encode_speed.started_alone(peer, model, texts_of(4))
    assert figures["created_s"] > 0
    assert figures["first_ms"] > 0
    assert 100 < figures["peak_mbytes"] < 10_000
    if not find_spec("llama_cpp"):
        missing = next(peer for peer in text_peers.PEERS if peer.name.startswith("llama"))
        with pytest.raises(RuntimeError, match="llama-cpp-python"):
            encode_speed.started_alone(missing, model, texts_of(4))


def test_the_texts_are_paragraphs_or_the_lines_of_a_file(tmp_path: Path) -> None:
    texts = paragraphs(50)
    assert texts == paragraphs(50)
    assert len(set(texts)) == 50
    assert len({len(text) // 100 for text in texts}) > 4, "of many lengths"
    file = tmp_path / "texts"
    file.write_text("one\n\ntwo\nthree\n")
    assert paragraphs(2, file) == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no text; expected one text a line"):
        paragraphs(2, file)


def test_the_command_names_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.models.encode_speed", "--file", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "No such file" in done.stderr, done.stderr
