"""Builds a tokenizer from the files of a checkpoint, with the ids of `AutoTokenizer` of transformers 5.

The class of the tokenizer is `tokenizer_class` of tokenizer_config.json, else of config.json, else that of the model
type. A known class is built from the vocabulary and its settings, as transformers builds it: tokenizer.json gives the
vocabulary alone, and a setting that is absent has the default of the class. `PreTrainedTokenizerFast`, and a
tokenizer.json with neither of these files, is read as it is. `never_split` and `do_basic_tokenize` belong to the slow
classes of transformers 4; AutoTokenizer ignores them, and so does this.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_fast._io import read_json
from bert_fast._text import read_lines
from bert_fast.data.tokenizer_classes import AS_IS, OF_CLASS, OF_MODEL, ROLES, Kind, build_tokenizer, text_of

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from bert_fast.data.tokenizer_classes import Token

# The white space at the end of a line of vocab.txt that the package tokenizers removes: Unicode's White_Space.
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
SENTENCEPIECE = "sentencepiece.bpe.model"
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_logger = logging.getLogger("bert_fast")


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say.

    Attributes:
        file: tokenizer.json, vocab.txt or vocab.json; the folder of a sentencepiece model.
        kind: how its class is built.
        settings: the settings of its class, and `split_special_tokens`.
        names: special tokens by role; a role that is null has none.
        added: the added tokens in the order of their ids.
        extra: special tokens without a role.
    """

    file: Path
    kind: Kind
    settings: Mapping[str, Any]
    names: Mapping[str, Token]
    added: list[AddedToken]
    extra: list[Token]

    @classmethod
    def read(cls, path: Path) -> TokenizerFiles:
        """Read the settings of a tokenizer file and of the folder that it is in, or of a folder with one.

        Raises:
            ValueError: there is no tokenizer, a file is invalid, or the class of the tokenizer is unknown; the message
                names it.
        """
        file, folder = _find(path), path if path.is_dir() else path.parent
        where = folder / "tokenizer_config.json"
        values = read_json(where) if where.is_file() else {}
        kind = _kind(folder, values, file)
        defaults = {**kind.settings, "split_special_tokens": False}
        settings = {name: values.get(name, default) for name, default in defaults.items()}
        for name, value in settings.items():
            if not isinstance(value, bool) and not (name == "strip_accents" and value is None):
                raise ValueError(f"{where}: {name!r} is {value!r}; expected true or false")
        if kind.model == "WordPiece" and (values.get("never_split") or values.get("do_basic_tokenize") is False):
            _logger.warning("%s: never_split and do_basic_tokenize are ignored, as AutoTokenizer ignores them", where)
        return cls(file, kind, settings, *_special(file, values, kind))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without padding and truncation.

        Raises:
            ValueError: the vocabulary can't be read, or lacks a token; the message names the file.
        """
        from tokenizers import Tokenizer

        try:
            as_is = self.kind.build is None
            vocabulary = Tokenizer.from_file(str(self.file)) if as_is else _vocabulary(self.file, self.kind.model)
            tokenizer = build_tokenizer(self.kind, vocabulary, self.settings, self.names, self.added, self.extra)
        except Exception as error:  # the package raises a bare Exception
            raise ValueError(f"{self.file}: not a {self.file.name} ({error})") from error
        tokenizer.encode_special_tokens = self.settings["split_special_tokens"]
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def _find(path: Path) -> Path:
    """The file of the vocabulary; the folder if it has a sentencepiece model alone."""
    needed = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), (SENTENCEPIECE,))
    for names in needed if path.is_dir() else ():
        if all((path / name).is_file() for name in names):
            return path if names == (SENTENCEPIECE,) else path / names[0]
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a tokenizer.json, a vocab.txt or a folder with one of them, or with one of vocab.json "
            f"with merges.txt, {SENTENCEPIECE}"
        )
    return path


def _kind(folder: Path, values: Mapping[str, Any], file: Path) -> Kind:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for name, settings in (("tokenizer_config.json", values), ("config.json", config)):
        if (declared := settings.get("tokenizer_class")) is None:
            continue
        kind = OF_CLASS.get(str(declared).removesuffix("Fast"))
        if kind is None or (kind is AS_IS and file.name != "tokenizer.json"):
            raise ValueError(
                f"{folder / name}: tokenizer_class is {declared!r}, which bert_fast does not know"
                f"{'' if kind is None else ' without a tokenizer.json'}; expected one of "
                f"{', '.join(name for name, known in OF_CLASS.items() if known is not AS_IS)}, or "
                "PreTrainedTokenizerFast with a tokenizer.json"
            )
        return kind
    if (model_type := config.get("model_type")) is not None:
        if model_type not in OF_MODEL:
            raise ValueError(
                f"{folder / 'config.json'}: model_type is {model_type!r}, whose tokenizer bert_fast does not know; "
                f"expected one of {', '.join(OF_MODEL)}, or tokenizer_class in tokenizer_config.json"
            )
        return OF_MODEL[str(model_type)]
    return {"tokenizer.json": AS_IS, "vocab.json": OF_MODEL["roberta"]}.get(file.name, OF_MODEL["bert"])


def _special(file: Path, values: dict[str, Any], kind: Kind) -> tuple[dict[str, Token], list[AddedToken], list[Token]]:
    """The special tokens by role, the added tokens in the order of their ids, and the special tokens without a role.

    With `added_tokens_decoder` tokenizer_config.json is complete; without it the files of transformers 4 are read too.
    """
    from tokenizers import AddedToken

    where = (file if file.is_dir() else file.parent) / "tokenizer_config.json"
    # A key such as add_bos_token is a flag, not a role.
    own = {role: values[role] for role in values if role.endswith("_token") and isinstance(values[role], str)}
    special = _Special(
        {role: None if values[role] is None else _token(values[role], where) for role in ROLES if role in values},
        {role: _token(name, where) for role, name in own.items() if role not in ROLES},
        {name: values[name] for name in (_EXTRA, _ADDITIONAL) if name in values},
    )
    if not special.lists.get(_EXTRA) and _ADDITIONAL in special.lists:
        special.lists[_EXTRA] = special.lists.pop(_ADDITIONAL)
    special.name_extra(where)
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in values:
        _add(added, values["added_tokens_decoder"], where)
    else:
        special.read_map(where.with_name("special_tokens_map.json"))
        _read_added(file, where.with_name("added_tokens.json"), special.contents(where), added)
    flagged = {token.content: token for token in added.values()}
    given = {role: token and flagged.get(text_of(token), token) for role, token in special.given.items()}
    names: dict[str, Token | None] = {**kind.names, **given, **special.own}
    for role in ("unk_token", "cls_token", "sep_token", "bos_token", "eos_token"):
        if role in kind.names and names[role] is None:
            raise ValueError(f"{where}: {role} is null; expected a token")
    if kind.spaced_mask and isinstance(mask := names["mask_token"], str):
        names["mask_token"] = AddedToken(mask, lstrip=True, special=True)
    roles = [*ROLES, *(role for role in names if role not in ROLES)]
    present: dict[str, Token] = {role: name for role in roles if (name := names.get(role)) is not None}
    extra = special.lists[_EXTRA] if _EXTRA in special.lists else special.lists.get(_ADDITIONAL) or list(kind.extra)
    return present, [added[i] for i in sorted(added)], _tokens(extra, where)


@dataclass
class _Special:
    """The special tokens in the files.

    Attributes:
        given: those of `ROLES`, and those of other roles in special_tokens_map.json.
        own: those of other roles in tokenizer_config.json, which take precedence.
        lists: `extra_special_tokens` and `additional_special_tokens`, its older name.
    """

    given: dict[str, Token | None]
    own: dict[str, Token]
    lists: dict[str, Any]

    def name_extra(self, where: Path) -> None:
        """Move `extra_special_tokens` with roles to `own`."""
        if isinstance(self.lists.get(_EXTRA), dict):
            self.own |= {str(role): _token(token, where) for role, token in self.lists.pop(_EXTRA).items()}

    def read_map(self, where: Path) -> None:
        """Update by special_tokens_map.json, if there is one."""
        for role, value in (read_json(where) if where.is_file() else {}).items():
            if role == _EXTRA and isinstance(value, list):
                before = _tokens(self.lists.get(_EXTRA) or [], where)
                new = _tokens(value, where, special=True)
                self.lists[_EXTRA] = [*before, *(token for token in new if token not in before)]
            elif role in (_EXTRA, _ADDITIONAL):
                self.lists[role] = value
            elif role.endswith("_token"):
                self.given[role] = None if value is None else _token(value, where, special=True)
        self.name_extra(where)

    def contents(self, where: Path) -> set[str]:
        """The tokens that are special if they are in added_tokens.json."""
        named = [token for role, token in self.given.items() if role in ROLES and token is not None]
        return {text_of(token) for token in [*named, *_tokens(self.lists.get(_EXTRA) or [], where)]}


def _read_added(file: Path, where: Path, special: set[str], added: dict[int, AddedToken]) -> None:
    """Read the added tokens of added_tokens.json, if there is one, and of `file`, if it is a tokenizer.json."""
    from tokenizers import AddedToken

    for content, number in (read_json(where) if where.is_file() else {}).items():
        is_special = content in special
        added[_id(number, where)] = AddedToken(content, normalized=not is_special, special=is_special)
    if file.name == "tokenizer.json":
        entries = read_json(file).get("added_tokens") or []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise ValueError(f"{file}: 'added_tokens' is no list of tokens with an id")
        _add(added, {str(entry["id"]): entry for entry in entries}, file)


def _add(added: dict[int, AddedToken], entries: Any, where: Path) -> None:
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: the added tokens are a {type(entries).__name__}; expected an object")
    for number, value in entries.items():
        token = _token(value, where)
        if isinstance(token, str):
            raise ValueError(f"{where}: the added token {number} is a string; expected an object with its content")
        added[_id(number, where)] = token


def _id(value: Any, where: Path) -> int:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ValueError(f"{where}: {str(value)[:40]!r} is the id of a token; expected an integer from 0")
    return value


def _tokens(values: Any, where: Path, *, special: bool | None = None) -> list[Token]:
    from tokenizers import AddedToken

    if values is not None and not isinstance(values, list):
        raise ValueError(f"{where}: special tokens are a {type(values).__name__}; expected a list")
    return [value if isinstance(value, AddedToken) else _token(value, where, special=special) for value in values or []]


def _token(value: Any, where: Path, *, special: bool | None = None) -> Token:
    """A token of a JSON value: a string, or an object with `content` and flags."""
    from tokenizers import AddedToken

    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and isinstance(content := value.get("content"), str) and content:
        flags = {name: value[name] for name in _FLAGS if name in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return AddedToken(content, **(flags if special is None else {**flags, "special": special}))
    raise ValueError(f"{where}: {str(value)[:60]!r} is no token; expected a string, or an object with 'content'")


def _vocabulary(file: Path, model: str) -> Any:
    """The vocabulary of a file as its class takes it.

    WordPiece: ids by token. BPE: the same, and the merges. Unigram: tokens and their scores, and the bytes that
    describe the normalization or None.
    """
    from tokenizers import models

    if file.suffix != ".json":
        return _read_vocab_txt(file)
    if file.name == "vocab.json":
        return models.BPE.read_file(str(file), str(file.parent / "merges.txt"))
    content = read_json(file)
    values = content.get("model")
    if not isinstance(values, dict):
        raise ValueError("it has no model")
    found = values.get("type", "WordPiece" if "continuing_subword_prefix" in values else "")
    if found != model:
        raise ValueError(f"a {found or 'nameless'} model; expected {model}, as its class has")
    vocab = values.get("vocab")
    if model == "WordPiece":
        return vocab
    if model == "BPE":
        merges = values.get("merges") or []
        return vocab, [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    return [tuple(entry) for entry in vocab or []], _charsmap(content.get("normalizer"))


def _charsmap(normalizer: Any) -> bytes | None:
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    for step in steps:
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return None


def _read_vocab_txt(file: Path) -> dict[str, int]:
    """The id of each token of a vocab.txt, as the package tokenizers reads it: of equal lines the last one counts."""
    return {line.rstrip(_WHITE_SPACE): number - 1 for number, line in read_lines(file)}
