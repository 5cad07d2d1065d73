"""The commands from prepare to embed on a tiny corpus, info and verify."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast import kernels
from bert_fast.cli import info
from bert_fast.cli.main import main
from bert_fast.kernels._common.dispatch import OPS, Implementation
from bert_fast.kernels._common.library import simulated


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text_file: Path, tiny_config: Path) -> Path:
    """The folder of the final model of `prepare` and `pretrain`."""
    base = tmp_path_factory.mktemp("cli")
    data, run = base / "data", base / "run"
    prepared = [
        "--output",
        str(data),
        "--sources",
        f"[{text_file}]",
        "--vocab_size",
        "120",
        "--heldout_fraction",
        "0.2",
    ]
    assert main(["prepare", *prepared, "--progress", "false"]) == 0
    settings = ["--data.seq_len", "32", "--data.token_budget", "256", "--model.config", str(tiny_config)]
    where = ["--output_dir", str(run), "--data.folder", str(data)]
    assert main(["pretrain", *where, *settings, "--epochs", "1", "--optimizer.lr", "3e-3", "--progress", "false"]) == 0
    return run / "final"


def test_pretrain_again_finds_the_run_finished(
    trained: Path, capsys: pytest.CaptureFixture[str], tiny_config: Path
) -> None:
    run = trained.parent
    before = (run / "log.jsonl").read_text()
    settings = ["--data.seq_len", "32", "--data.token_budget", "256", "--model.config", str(tiny_config)]
    where = ["--output_dir", str(run), "--data.folder", str(run.parent / "data")]
    assert main(["pretrain", *where, *settings, "--epochs", "1", "--optimizer.lr", "3e-3", "--progress", "false"]) == 0
    assert "held-out mlm_loss" in capsys.readouterr().out
    assert (run / "log.jsonl").read_text() == before


def test_fill_mask_prints_the_most_probable_tokens(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "the small [MASK] sings near the [MASK]."
    assert main(["fill-mask", str(trained), text, "--top_k", "4", "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)
    assert prediction["text"] == text
    assert [len(choices) for choices in prediction["masks"]] == [4, 4]
    for choices in prediction["masks"]:
        probabilities = [choice["probability"] for choice in choices]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.0001
    assert main(["fill-mask", str(trained), text]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == text
    assert printed[1].startswith(f"  1: {prediction['masks'][0][0]['token']} ")
    assert main(["fill-mask", str(trained), "no mask here"]) == 2
    assert "no [MASK] in 'no mask here'" in capsys.readouterr().err


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "pooler"])
def test_embed_equals_one_text_at_a_time_with_transformers(trained: Path, pooling: str, tmp_path: Path) -> None:
    import transformers

    texts = ["the cat sleeps.", "a", "the old red bird sings quietly over the river and then again", "the cat sleeps."]
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts[1:]) + "\n")
    output = tmp_path / "vectors.npy"
    arguments = ["embed", str(trained), texts[0], "--file", str(file), "--pooling", pooling, "--output", str(output)]
    assert main([*arguments, "--batch_tokens", "20"]) == 0
    vectors = torch.from_numpy(np.load(output))
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    model = transformers.BertModel.from_pretrained(trained).eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"))
        hidden = out.last_hidden_state[0]
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "max": hidden.amax(0), "pooler": out.pooler_output[0]}
        # float32 in another order through the layers: the error is 5e-7, two eps of values of up to 3.
        assert torch.allclose(vector, expected[pooling], atol=1e-5)


def test_a_checkpoint_without_the_head_or_the_pooler_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bert_fast.models import BertModel

    BertModel.from_pretrained(trained, add_pooling_layer=False).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text((trained / "vocab.txt").read_text())
    capsys.readouterr()
    assert main(["fill-mask", str(tmp_path), "a [MASK]"]) == 2
    assert (
        "can't be used as BertForMaskedLM: newly initialized, because not in the checkpoint" in capsys.readouterr().err
    )
    assert main(["embed", str(tmp_path), "a", "--pooling", "pooler"]) == 2
    assert "pooler.dense.weight" in capsys.readouterr().err
    assert main(["embed", str(tmp_path), "a"]) == 0
    assert capsys.readouterr().err == ""


def test_embed_writes_every_format_alike(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    texts = ["the cat sleeps.", "the grün bird"]
    vectors = {}
    for suffix in ("npy", "jsonl", "parquet"):
        path = tmp_path / f"vectors.{suffix}"
        assert main(["embed", str(trained), *texts, "--normalize", "--output", str(path)]) == 0
        if suffix == "npy":
            vectors[suffix] = np.load(path).tolist()
        elif suffix == "jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            assert [line["text"] for line in lines] == texts
            vectors[suffix] = [line["embedding"] for line in lines]
        else:
            table = pq.read_table(path).to_pydict()
            assert table["text"] == texts
            vectors[suffix] = table["embedding"]
    assert vectors["npy"] == vectors["jsonl"] == vectors["parquet"]
    # float32 vectors: a component is off by half an eps (6e-8).
    assert np.linalg.norm(vectors["npy"], axis=1) == pytest.approx([1.0, 1.0], rel=1e-6)
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
    assert main(["embed", str(trained), "--normalize"]) == 0
    assert [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()] == vectors["npy"]


def test_embed_reads_a_folder_of_sentence_transformers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its Transformer in a folder of its own, a prompt, a length and fewer bits; a module it lacks is refused."""
    from bert_fast.models import BertModel

    folder = tmp_path / "model"
    shutil.copytree(trained, folder / "0_Transformer")
    modules = {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    entries = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules.items()]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": ["max", "lasttoken"]}))
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    prompts = {"prompts": {"query": "the cat: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    texts = ["the cat sleeps.", "the old red bird sings quietly over the river and then again"]
    options = ["--prompt-name", "query", "--truncate-dim", "11", "--precision", "ubinary"]
    assert main(["embed", str(folder), *texts, *options]) == 0
    bits = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    vectors = BertModel.from_pretrained(trained).encode(
        [prompts["prompts"]["query"] + text for text in texts], pooling=["max", "lasttoken"], max_seqlen=7
    )
    assert bits == np.packbits(vectors[:, :11].numpy() > 0, axis=1).tolist()  # type: ignore[union-attr]
    entries[2]["type"] = "sentence_transformers.models.CNN"
    (folder / "modules.json").write_text(json.dumps(entries))
    assert main(["embed", str(folder), *texts]) == 2
    assert "the module 'sentence_transformers.models.CNN' is not supported" in capsys.readouterr().err


def test_embed_cuts_long_texts_and_checks_the_limit(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vectors.npy"
    long, start = "the cat " * 100, "the cat the cat"
    assert main(["embed", str(trained), long, start, "--max_seqlen", "6", "--output", str(path)]) == 0
    vectors = np.load(path)
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6)
    assert main(["embed", str(trained), long, "--output", str(path)]) == 0
    assert main(["embed", str(trained), long, "--max_seqlen", "65"]) == 2
    assert "max_seqlen is 65; expected 2 to 64, the model's maximum" in capsys.readouterr().err


def test_info_names_every_implementation_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch            {torch.__version__}" in printed
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["threads"] == torch.get_num_threads()
    for op, impls in kernels.available_impls().items():
        for impl, state in impls.items():
            assert report["operations"][op][impl]["reason"] == state.reason
            assert state.ok or state.reason in printed
        assert sum(state["chosen"] for state in report["operations"][op].values()) == 1


def test_info_names_the_architectures_of_the_cuda_kernels_also_where_they_cannot_run() -> None:
    report = {"built": True, "reason": "", "cuda": "13.0", "architectures": ["80", "90a"]}
    assert info._cuda_state(report, "") == "built with CUDA 13.0 for sm_80, sm_90a"
    reason = "no CUDA device was found"
    assert info._cuda_state(report, reason) == f"built with CUDA 13.0 for sm_80, sm_90a; {reason}"
    assert info._cuda_state({"built": False, "reason": "no nvcc"}, "not built: no nvcc") == "not built: no nvcc"


def test_verify_covers_every_op_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    # tests/kernels runs the same cases in the Triton interpreter and the emulator, where they would take minutes here.
    requested = [impl for impl in ("reference", "triton", "cuda", "cpu") if not simulated(impl)]
    assert main(["verify", "--impls", f"[{','.join(requested)}]"]) == 0
    printed = capsys.readouterr().out
    for op, impls in kernels.available_impls().items():
        for impl, state in impls.items():
            rows = [line for line in printed.splitlines() if line.startswith(f"{op:<21} {impl:<10}")]
            assert bool(rows) == (state.ok and impl in requested)
            assert all(line.endswith("  ok") for line in rows)
            dtypes = OPS[op].impls[impl].dtypes or (torch.float32, torch.bfloat16, torch.float16)
            tested = {str(dtype).removeprefix("torch.") for dtype in dtypes} - {"float64"}
            assert not rows or {line.split()[3] for line in rows} == tested


def test_verify_fails_if_a_kernel_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["bias_gelu"]
    reference = op.impls["reference"].call

    def raises(*_: object) -> torch.Tensor:
        raise RuntimeError("out of registers")

    monkeypatch.setitem(op.impls, "triton", Implementation(lambda *inputs: reference(*inputs) * 1.001, None, None))
    monkeypatch.setitem(op.impls, "cuda", Implementation(raises, None, None))
    assert main(["verify", "--ops", "[bias_gelu]"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    rows = {impl: [line for line in lines if line.split()[:2] == ["bias_gelu", impl]] for impl in op.impls}
    assert all(line.endswith("  ok") for line in rows["reference"])
    assert all(line.endswith("  FAILED") for line in rows["triton"] if "float32" in line)
    assert all("RuntimeError: out of registers" in line for line in rows["cuda"])
    assert "cases failed" in captured.err
