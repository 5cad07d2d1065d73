"""Shared by several commands: load a model and its tokenizer; read texts from arguments, files or stdin."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load(kind: str, folder: str, device: str, **settings: Any) -> tuple[Any, Any]:
    """The model of class `bert_fast.models.<kind>` in eval mode on `device`, and its tokenizer.

    Raises:
        FileNotFoundError: `folder` doesn't exist.
        ValueError: the checkpoint is corrupt, lacks parameters, or has fewer rows than the tokenizer has tokens.
    """
    import bert_fast.models
    from bert_fast._device import resolve_device
    from bert_fast.data.tokenizer import check_rows, load_tokenizer
    from bert_fast.models.checkpoint import NOT_STORED

    if not Path(folder).is_dir():
        expected = "a checkpoint (config.json, model.safetensors, vocab.txt)"
        raise FileNotFoundError(f"{folder} is not a folder; expected {expected}")
    target, tokenizer = resolve_device(device), load_tokenizer(folder)
    with _collected_warnings() as warnings:
        model = getattr(bert_fast.models, kind).from_pretrained(folder, **settings)
    for text in warnings:
        if text.startswith(NOT_STORED):
            raise ValueError(f"{folder} can't be used as {kind}: {text}")
    check_rows(tokenizer, model.config.vocab_size, folder)
    return model.to(target).eval(), tokenizer


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings of the logger "bert_fast" instead of printing them: unused heads are expected here."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("bert_fast")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield warnings
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def read_texts(texts: list[str], file: str | None) -> list[str]:
    """The texts of the arguments, then the lines of `file`; stdin if `file` is "-" or if there are neither."""
    lines = list(texts)
    if file == "-" or (file is None and not texts):
        lines += sys.stdin.read().splitlines()
    elif file is not None:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not lines:
        raise ValueError("no text; pass texts as arguments, --file FILE, or lines on stdin")
    return lines


def shows_progress() -> bool:
    """Whether stderr is a terminal and tqdm is installed."""
    return sys.stderr.isatty() and find_spec("tqdm") is not None
