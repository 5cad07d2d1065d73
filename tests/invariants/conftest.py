"""Folders of small models, and subjects with a planted fault, written with transformers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bert_fast.invariants import Reference

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
POSITIONS = 128


def write_model(folder: Path, tokenizer: Path, model_type: str, modules: dict[str, Any] | None = None) -> None:
    """A random model of transformers, whose activations are far enough from 0 to show which GeLU it has."""
    torch.manual_seed(0)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {**SIZES, "initializer_range": 0.3, "pad_token_id": loaded.pad_token_id or 0}
    rows = 2 if model_type in ("roberta", "xlm-roberta") else 0
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=max(len(loaded), 420), max_position_embeddings=POSITIONS + rows, **settings
    )
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    if modules is not None:
        entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        entries.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
        if modules.get("normalize"):
            entries.append({"idx": 2, "name": "2", "path": "2_N", "type": "sentence_transformers.models.Normalize"})
        (folder / "modules.json").write_text(json.dumps(entries))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 32, f"pooling_mode_{modules['pooling']}": True}
        pooling.setdefault("pooling_mode_mean_tokens", False)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        settings_file = {"max_seq_length": modules["max_seq_length"], "do_lower_case": False}
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings_file))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Callable[[str], Path]) -> Any:
    """`model_folder("roberta")`, or with modules of sentence-transformers; one of each is made."""
    made: dict[str, Path] = {}

    def folder_of(model_type: str, **modules: Any) -> Path:
        key = f"{model_type} {modules}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            tokenizer = tokenizer_folder("electra" if model_type == "bert" else model_type)
            write_model(made[key], tokenizer, model_type, modules or None)
        return made[key]

    return folder_of


class Planted:
    """A server's encoder with a fault, in float32; without one it is right.

    Args:
        reference: gives tokenization and the lengths.
        fault: the name of the fault.
    """

    def __init__(self, reference: Reference, fault: str = "") -> None:
        self.name, self.reference, self.fault = fault or "right", reference, fault
        config = transformers.AutoConfig.from_pretrained(reference.weights)
        if fault == "tanh":
            config.hidden_act = "gelu_new"
        self.model = transformers.AutoModel.from_pretrained(reference.weights, config=config).eval()
        if fault == "types":
            self.model.embeddings.token_type_embeddings.weight.data.zero_()
        self.first = self.reference.positions(1)[0, 0].item()

    def tokens(self, text: str) -> list[int]:
        if self.fault == "length":
            return self.reference.ids(text, max_seqlen=32)
        if self.fault == "case":
            text = text.lower()
        return self.reference.ids(text, special=self.fault != "special" or not text.strip())

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        ids = [self.tokens(text) for text in texts]
        length, before, vectors = max(map(len, ids)), 0, []
        for row in ids:
            padded = torch.tensor([row + [self.model.config.pad_token_id] * (length - len(row))])
            mask = (torch.arange(length) < len(row)).long().unsqueeze(0)
            positions = self.first + torch.arange(length).unsqueeze(0)
            if self.fault == "flattened":
                positions = (positions + before).clamp(max=self.model.config.max_position_embeddings - 1)
            if self.fault == "offset":
                positions = positions - self.first  # as BERT counts, in a model of RoBERTa's family
            before += len(row)
            attended = torch.ones_like(mask) if self.fault == "attended" else mask
            states = self.model(padded, attention_mask=attended, position_ids=positions).last_hidden_state[0]
            vectors.append(self.pool(states, len(row)))
        if self.fault == "sorted":
            order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
            return torch.stack([vectors[index] for index in order])
        if self.fault == "random":
            return torch.stack(vectors) + 1e-3 * torch.randn(len(ids), 32)
        return torch.stack(vectors)

    def pool(self, states: Tensor, length: int) -> Tensor:
        states = states if self.fault == "padding" else states[:length]
        return states[0] if self.fault == "cls" else states.mean(0)
