"""What several commands need: the model and the tokenizer of a checkpoint, and texts from arguments, files or stdin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def load(kind: str, folder: str, device: str) -> tuple[Any, Any]:
    """The model of the class `bert_fast.models.<kind>` in eval mode on `device`, and its tokenizer."""
    import bert_fast.models
    from bert_fast.data import load_tokenizer
    from bert_fast.training.parts import resolve_device

    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; expected a checkpoint (config.json, model.safetensors, vocab.txt)"
        )
    target, tokenizer = resolve_device(device), load_tokenizer(folder)
    return getattr(bert_fast.models, kind).from_pretrained(folder).to(target).eval(), tokenizer


def read_texts(texts: list[str], file: str | None) -> list[str]:
    """The texts of the arguments, then the lines of `file`; "-", or neither, reads the lines of stdin."""
    lines = list(texts)
    if file == "-" or (file is None and not texts):
        lines += sys.stdin.read().splitlines()
    elif file is not None:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not lines:
        raise ValueError("no text given; give texts as arguments, --file FILE, or lines on stdin")
    return lines
