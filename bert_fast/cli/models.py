"""Shared by several commands: load a model and its tokenizer; read texts from arguments, files or stdin."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bert_fast._text import read_lines


def load(kind: str, folder: str, device: str, **settings: Any) -> tuple[Any, Any]:
    """The model of class `bert_fast.models.<kind>` in eval mode on `device`, and its tokenizer.

    Raises:
        FileNotFoundError: `folder` is neither a folder nor a hub name that can be reached.
        ValueError: the checkpoint is corrupt, lacks parameters, or has fewer rows than the tokenizer has tokens.
    """
    import bert_fast.models
    from bert_fast._device import resolve_device
    from bert_fast.data.tokenizer import check_rows, load_tokenizer
    from bert_fast.models.checkpoint import NOT_STORED
    from bert_fast.models.files import Source
    from bert_fast.models.sentence import transformer_source
    from bert_fast.models.texts import lowercased

    target = resolve_device(device)
    local = model_folder(folder)
    tokenizer = load_tokenizer(local / transformer_source(Source(local)).subfolder)
    with _collected_warnings() as warnings:
        model = getattr(bert_fast.models, kind).from_pretrained(local, **settings)
    for text in warnings:
        if text.startswith(NOT_STORED):
            raise ValueError(f"{folder} can't be used as {kind}: {text}")
    check_rows(tokenizer, model.config.vocab_size, folder)
    if model.modules_of_texts.lowercase:
        tokenizer = lowercased(tokenizer)
    return model.to(target).eval(), tokenizer


def model_folder(name: str, expected: str = "a checkpoint (config.json, model.safetensors, vocab.txt)") -> Path:
    """The folder of a model, or that of a hub repository in the hub's cache; see `local_folder`."""
    from bert_fast.models.snapshot import local_folder

    return local_folder(name, expected)


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
    """The texts of the arguments, then the lines of `file`; stdin if `file` is "-" or if there are neither.

    Raises:
        OSError: `file` can't be opened.
        ValueError: it is not UTF-8 (the message names the line), or there is no text.
    """
    lines = list(texts)
    if file == "-" or (file is None and not texts):
        lines += [line for _, line in read_lines(sys.stdin, "stdin")]
    elif file is not None:
        lines += [line for _, line in read_lines(file)]
    if not lines:
        raise ValueError("no text; pass texts as arguments, --file FILE, or lines on stdin")
    return lines


def shows_progress() -> bool:
    """Whether stderr is a terminal and tqdm is installed."""
    return sys.stderr.isatty() and find_spec("tqdm") is not None
