"""The kind of a folder with modules.json: that of its modules, whatever class its config.json names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bert_fast.serve.model import load

_PACKAGE = "sentence_transformers.models"


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"])
def test_a_sentence_transformer_embeds_whatever_its_config_names(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Encoders are often saved with the class of their pretraining, as all-mpnet-base-v2 is."""
    folder = tmp_path / "model"
    shutil.copytree(folders["embedder"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    entries = [{"path": "", "type": f"{_PACKAGE}.Transformer"}, {"path": "1_Pooling", "type": f"{_PACKAGE}.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    served = load(str(folder), device="cpu", precision="fp32", auto_truncate=True)
    assert (served.kind, served.modules.pooling) == ("embedding", ("cls",))


def test_a_sparse_encoder_in_a_subfolder_is_sparse(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["filler"], folder / "0_Transformer")
    entries = [
        {"path": "0_Transformer", "type": f"{_PACKAGE}.Transformer"},
        {"path": "1_SpladePooling", "type": "sentence_transformers.sparse_encoder.models.SpladePooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "SparseEncoder"}))
    (folder / "1_SpladePooling").mkdir()
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps({"pooling_strategy": "sum"}))
    served = load(str(folder), device="cpu", precision="fp32", auto_truncate=True)
    assert (served.kind, served.modules.pooling) == ("masked-lm", ("sum",))
