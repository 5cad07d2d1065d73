"""Writes the files of a tokenizer: one consistent set, which AutoTokenizer of transformers reads to the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_fast._io import write_json, write_text
from bert_fast.data.tokenizer import load_tokenizer
from bert_fast.data.tokenizer_classes import OF_CLASS, Kind, build_tokenizer, text_of
from bert_fast.data.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The classes that transformers builds from settings; any other tokenizer is read by it as tokenizer.json has it.
_CLASSES = ("BertTokenizer", "MPNetTokenizer", "RobertaTokenizer")


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, *, model_max_length: int = 512, names: Mapping[str, str] | None = None
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and, for WordPiece, `vocab.txt`.

    AutoTokenizer of transformers, and `load_tokenizer`, read them to the same ids.

    Args:
        tokenizer: the tokenizer.
        folder: an existing folder.
        model_max_length: maximum number of tokens of the model, for transformers.
        names: its special tokens by role (`pad_token`, ...); those of BERT or RoBERTa that it has if None.
    """
    folder = Path(folder)
    content = json.loads(tokenizer.to_str())
    if names is None:
        names = _usual_names(tokenizer)
    class_name, settings = _class_of(content, names)
    added = tokenizer.get_added_tokens_decoder()
    special = [token.content for token in added.values() if token.special and token.content not in names.values()]
    empty = [tokenizer.encode("", add_special_tokens=False) for _ in range(2)]
    pair = tokenizer.post_process(empty[0], empty[1])
    inputs = ["input_ids", *(["token_type_ids"] if any(pair.type_ids) else []), "attention_mask"]
    config = {
        "tokenizer_class": class_name,
        **settings,
        "model_max_length": model_max_length,
        **names,
        **({"additional_special_tokens": special} if special else {}),
        **({"split_special_tokens": True} if tokenizer.encode_special_tokens else {}),
        "model_input_names": inputs,
        "added_tokens_decoder": {str(number): token.__getstate__() for number, token in sorted(added.items())},
    }
    if content["model"]["type"] == "WordPiece":
        write_text(folder / "vocab.txt", _vocab_txt(tokenizer))
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", config)


def copy_tokenizer(source: str | Path, folder: str | Path, *, model_max_length: int = 512) -> None:
    """Write the tokenizer of the checkpoint `source` to `folder`, as `save_tokenizer` does, with its special tokens."""
    files = TokenizerFiles.read(Path(source))
    names = {role: text_of(token) for role, token in files.names.items()}
    save_tokenizer(load_tokenizer(source), folder, model_max_length=model_max_length, names=names or None)


def _vocab_txt(tokenizer: Tokenizer) -> str:
    """The tokens of the vocabulary in the order of their ids; a line is empty if an id has no token."""
    tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=False).items()}
    return "".join(f"{tokens.get(number, '')}\n" for number in range(max(tokens, default=-1) + 1))


def _usual_names(tokenizer: Tokenizer) -> dict[str, str]:
    vocab = tokenizer.get_vocab()
    kind = OF_CLASS["BertTokenizer" if "[CLS]" in vocab else "RobertaTokenizer"]
    return {role: name for role, name in kind.names.items() if name in vocab}


def _class_of(content: dict[str, Any], names: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The class of transformers that builds this tokenizer, and its settings."""
    normalizer, pre_tokenizer = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    settings = {
        "do_lower_case": normalizer.get("lowercase"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars"),
        "strip_accents": normalizer.get("strip_accents"),
        "add_prefix_space": pre_tokenizer.get("add_prefix_space"),
        "trim_offsets": (content["post_processor"] or {}).get("trim_offsets"),
    }
    for class_name in _CLASSES:
        kind = OF_CLASS[class_name]
        own = {name: settings[name] for name in kind.settings}
        if kind.model == content["model"]["type"] and _builds(kind, own, names, content):
            return f"{class_name}Fast", own
    return "PreTrainedTokenizerFast", {}


def _builds(kind: Kind, settings: dict[str, Any], names: Mapping[str, str], content: dict[str, Any]) -> bool:
    """Whether a class with these settings gives the tokenizer `content`, apart from its vocabulary."""
    if any(not isinstance(value, bool) for name, value in settings.items() if name != "strip_accents"):
        return False
    if any(role not in names for role in kind.names):
        return False
    vocab = {**content["model"]["vocab"], **{token["content"]: token["id"] for token in content["added_tokens"]}}
    few = {name: vocab[name] for name in names.values() if name in vocab}
    if len(few) < len({*names.values()}):
        return False
    built = json.loads(build_tokenizer(kind, few if kind.model == "WordPiece" else (few, []), settings, names).to_str())
    parts = ("normalizer", "pre_tokenizer", "post_processor")
    return all(built[part] == content[part] for part in parts) and _parameters(built) == _parameters(content)


def _parameters(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content["model"].items() if name not in ("vocab", "merges")}
