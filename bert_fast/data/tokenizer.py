"""Loads the tokenizer of a checkpoint of `bert_fast.models`.

WordPiece (BERT, DistilBERT, ELECTRA), byte-level BPE (RoBERTa) and Unigram (XLM-RoBERTa, CamemBERT) are read from
`tokenizer.json`, WordPiece also from `vocab.txt`. Older formats are converted by transformers.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bert_fast.data.vocab import load_wordpiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The files of a tokenizer, to be copied with the model.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)
# The files of a tokenizer without tokenizer.json, and the packages that convert them.
_OLDER = (
    (("vocab.json", "merges.txt"), ("transformers",)),
    (("sentencepiece.bpe.model",), ("transformers", "sentencepiece", "google.protobuf")),
)
_MASKS = ("[MASK]", "<mask>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint from a folder, a `tokenizer.json` or a `vocab.txt`.

    Args:
        path: a file, or a folder with `tokenizer.json`, else `vocab.txt`, else `vocab.json` and `merges.txt`, else
            `sentencepiece.bpe.model`. The last two are converted by transformers (extra `tokenizers`).

    Returns:
        The tokenizer, without padding and truncation.

    Raises:
        ValueError: there is no such file, it can't be read, or it adds no special tokens to a text.
        ImportError: a package required to convert an older format is not installed.
    """
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        folder = file
        file = next((folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()), folder)
        if file == folder:
            return _checked(folder, _converted(folder))
    if not file.is_file():
        raise ValueError(f"{path}: expected a tokenizer.json, a vocab.txt or a folder with one of them")
    if file.suffix != ".json" or _kind(file) == "WordPiece":
        return load_wordpiece(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
    return _checked(file, tokenizer)


def _kind(file: Path) -> str:
    """The type of model in a `tokenizer.json`, "" if it is not specified."""
    try:
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        return str(model.get("type", "WordPiece" if "continuing_subword_prefix" in model else ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a tokenizer.json ({type(error).__name__}: {error})") from error


def _checked(where: Path, tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.num_special_tokens_to_add(False) < 2 or tokenizer.num_special_tokens_to_add(True) < 3:
        raise ValueError(
            f"{where}: the tokenizer adds no special tokens; expected a post_processor that does, as in "
            "[CLS] text [SEP] or <s> text </s>"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _converted(folder: Path) -> Tokenizer:
    """The tokenizer of a folder without tokenizer.json and vocab.txt."""
    names, packages = next(
        ((names, needs) for names, needs in _OLDER if all((folder / name).is_file() for name in names)), ((), ())
    )
    if not names:
        older = ", ".join(" with ".join(names) for names, _ in _OLDER)
        raise ValueError(
            f"{folder}: expected a tokenizer.json, a vocab.txt or a folder with one of them, or with one of {older}"
        )
    shown = " and ".join(names)
    # find_spec raises if the namespace package google is absent, so it is looked up first.
    absent = [name for name in packages if not find_spec(name.partition(".")[0]) or not find_spec(name)]
    if absent:
        raise ImportError(
            f"{folder} has {shown} and no tokenizer.json; {', '.join(absent)}, needed to convert it, is not installed: "
            "pip install 'bert_fast[tokenizers]'"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # of any kind, from three libraries
        raise ValueError(f"{folder}: {shown} can't be read ({error})") from error
    return tokenizer


def mask_token(tokenizer: Tokenizer) -> str:
    """The mask token.

    Raises:
        ValueError: the tokenizer has none.
    """
    for name in _MASKS:
        if tokenizer.token_to_id(name) is not None:
            return name
    raise ValueError(f"the tokenizer has neither {' nor '.join(_MASKS)}")
