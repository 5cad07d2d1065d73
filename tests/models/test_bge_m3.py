"""bge-m3: its three outputs, against the paper's formulas over transformers' encoder in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer
from bert_fast.models import BgeM3Model, maxsim

E, D, V = 32, 24, 40
TEXTS = ["w1 w2 w1 w3", "w7", "", "w4 w5 zz w6 w4", "w5 w6 " * 30, *(f"w{i} w{i + 3} w2 w2" for i in range(9))]
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # float32 through two layers, values of the order of 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bge-m3")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (path / "vocab.txt").write_text("\n".join([*special, *(f"w{i}" for i in range(V - len(special)))]) + "\n")
    save_tokenizer(load_tokenizer(path / "vocab.txt"), path, model_max_length=20)
    torch.manual_seed(0)
    sizes = {"hidden_size": E, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.XLMRobertaConfig(
        vocab_size=V,
        max_position_embeddings=50,
        pad_token_id=0,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        initializer_range=0.3,
        **sizes,
    )
    encoder: Any = transformers.XLMRobertaModel(config).eval()
    encoder.save_pretrained(path)
    for name, size in (("sparse", 1), ("colbert", D)):
        linear = torch.nn.Linear(E, size)
        if name == "sparse":  # most of the weights of tokens are positive
            with torch.no_grad():
                linear.bias -= linear(encoder(torch.arange(1, 19).view(1, -1)).last_hidden_state).amin()
        torch.save(linear.state_dict(), path / f"{name}_linear.pt")
    return path


def expected(folder: Path) -> tuple[Any, Any, list[Any]]:
    """dense (B, E), sparse (B, V) and the vectors of tokens, one text after the other."""
    encoder: Any = transformers.XLMRobertaModel.from_pretrained(folder).double().eval()
    linears = [torch.load(folder / f"{name}_linear.pt", weights_only=True) for name in ("sparse", "colbert")]
    (w, b), (W, c) = ((x["weight"].double().numpy(), x["bias"].double().numpy()) for x in linears)
    tokenizer = load_tokenizer(folder)
    dense, sparse, vectors = [], np.zeros((len(TEXTS), V)), []
    for row, text in enumerate(TEXTS):
        ids = tokenizer.encode(text).ids
        ids = ids if len(ids) <= 20 else [*ids[:19], ids[-1]]
        with torch.no_grad():
            h = encoder(torch.tensor([ids])).last_hidden_state[0].numpy()
        dense.append(h[0] / np.linalg.norm(h[0]))
        for i, token in enumerate(ids):
            if token not in (0, 1, 2, 3):
                sparse[row, token] = max(sparse[row, token], (w @ h[i] + b).item())
        x = h[1:] @ W.T + c
        vectors.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return np.stack(dense), sparse, vectors


@pytest.mark.parametrize("batch_tokens", [8192, 7])
def test_the_outputs_are_the_papers(folder: Path, batch_tokens: int) -> None:
    model = BgeM3Model.from_pretrained(folder, allow_pickle=True)
    out = model.encode(TEXTS, batch_tokens=batch_tokens)
    dense, sparse, vectors = expected(folder)
    np.testing.assert_allclose(out["dense"], dense, **TOLERANCE)
    np.testing.assert_allclose(out["sparse"].to_dense(), sparse, **TOLERANCE)
    assert (out["sparse"].values() > 0).all()
    assert (sparse > 0).sum() > 20
    for x, y in zip(out["multi_vector"], vectors, strict=True):
        np.testing.assert_allclose(x, y, **TOLERANCE)
    scores = maxsim(out["multi_vector"][:2], out["multi_vector"], normalize=True)
    best = [[(q @ d.T).max(1).mean() for d in vectors] for q in vectors[:2]]
    np.testing.assert_allclose(scores, best, **TOLERANCE)


def test_only_what_is_requested(folder: Path) -> None:
    model = BgeM3Model.from_pretrained(folder, allow_pickle=True)
    assert set(model.encode(TEXTS[:2], output="sparse")) == {"sparse"}
    assert torch.equal(model.encode(TEXTS, output=["dense"])["dense"], model.encode(TEXTS)["dense"])
    empty = model.encode([])
    assert empty["dense"].shape == (0, E)
    assert empty["sparse"].shape == (0, V)
    assert empty["multi_vector"] == []
    with pytest.raises(ValueError, match="output is 'colbert'; expected one or several of dense, sparse"):
        model.encode(TEXTS, output="colbert")
    with pytest.raises(TypeError, match="texts is"):
        model.encode("w1")
    with pytest.raises(TypeError, match=r"texts\[1\] is"):
        model.encode(["w1", 2])  # type: ignore[list-item]


def test_wrong_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pass allow_pickle=True"):
        BgeM3Model.from_pretrained(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    torch.save(torch.nn.Linear(E + 1, D).state_dict(), copy / "colbert_linear.pt")
    with pytest.raises(ValueError, match=r"colbert_linear.pt has .*expected the weight \(D, 32\)"):
        BgeM3Model.from_pretrained(copy, allow_pickle=True)
    (copy / "sparse_linear.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no sparse_linear\.pt"):
        BgeM3Model.from_pretrained(copy, allow_pickle=True)


def test_a_tokenizer_of_transformers(folder: Path) -> None:
    loaded = BgeM3Model.from_pretrained(folder, allow_pickle=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(folder))
    model = BgeM3Model(loaded.model, loaded.sparse, loaded.multi_vector, tokenizer)
    texts = ["w1 w2", "w3"]
    assert torch.equal(model.encode(texts, output="dense")["dense"], loaded.encode(texts, output="dense")["dense"])
