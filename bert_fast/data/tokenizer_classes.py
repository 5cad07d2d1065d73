"""The classes of tokenizers that transformers has for the models of this package, as data, and how it builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    Token: TypeAlias = str | AddedToken

MAX_WORD = 100  # characters; WordPiece turns longer words into the unknown token
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT_NAMES = dict(zip(ROLES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"), strict=True))
_ROBERTA_NAMES = dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>"), strict=True))


@dataclass(frozen=True)
class Kind:
    """How transformers builds a class of tokenizers.

    Attributes:
        model: the type of its vocabulary, "" for a tokenizer.json that is read as it is.
        build: makes the tokenizer of a vocabulary, the settings and the names; None if it is read as it is.
        process: sets the post-processor.
        names: its special tokens by role.
        settings: its settings and their defaults.
        extra: special tokens without a role.
        spaced_mask: whether the mask token includes the space before it.
    """

    model: str = ""
    build: Callable[[Any, Mapping[str, Any], Mapping[str, Token]], Tokenizer] | None = None
    process: Callable[[Tokenizer, Mapping[str, Any], Mapping[str, Token]], None] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    spaced_mask: bool = False


def text_of(token: Token) -> str:
    """The text of a token."""
    return token if isinstance(token, str) else str(token.content)


def _wordpiece(vocab: dict[str, int], settings: Mapping[str, Any], names: Mapping[str, Token]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = text_of(names["unk_token"])
    if unknown not in vocab:
        raise ValueError(f"the vocabulary has no unk_token, {unknown}")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=MAX_WORD))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _byte_level(parts: tuple[Any, Any], settings: Mapping[str, Any], names: Mapping[str, Token]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = parts
    model = models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings["add_prefix_space"])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _unigram(
    parts: tuple[Any, Any], settings: Mapping[str, Any], names: Mapping[str, Token], unk_id: int | None = None
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab, charsmap = parts
    if unk_id is None:
        unk_id = next((i for i, (token, _) in enumerate(vocab) if token == text_of(names["unk_token"])), 0)
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=unk_id, byte_fallback=False))
    if charsmap is not None:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    scheme = "always" if settings["add_prefix_space"] else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def _template(first: str, last: str, separators: int, pair_type: int) -> Any:
    """Sets the post-processor `first text last`, and `first text last second last` with 1 or 2 separators."""

    def process(tokenizer: Tokenizer, settings: Mapping[str, Any], names: Mapping[str, Token]) -> None:
        from tokenizers import processors

        begin, end = text_of(names[first]), text_of(names[last])
        between = " ".join([f"{end}:0"] * separators)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}:0 $A:0 {end}:0",
            pair=f"{begin}:0 $A:0 {between} $B:{pair_type} {end}:{pair_type}",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in {begin: 0, end: 0}],
        )

    return process


def _roberta(tokenizer: Tokenizer, settings: Mapping[str, Any], names: Mapping[str, Token]) -> None:
    from tokenizers import processors

    ids = tokenizer.get_vocab()
    sep, cls = (text_of(names[role]) for role in ("sep_token", "cls_token"))
    tokenizer.post_processor = processors.RobertaProcessing(
        (sep, ids[sep]), (cls, ids[cls]), settings.get("trim_offsets", True), settings.get("add_prefix_space", False)
    )


_BERT_SETTINGS = {"do_lower_case": True, "tokenize_chinese_chars": True, "strip_accents": None}
_BERT = Kind(
    "WordPiece", _wordpiece, _template("cls_token", "sep_token", 1, 1), names=_BERT_NAMES, settings=_BERT_SETTINGS
)
_MPNET = Kind(
    "WordPiece",
    _wordpiece,
    _roberta,
    names={**_ROBERTA_NAMES, "unk_token": "[UNK]"},
    settings=_BERT_SETTINGS,
    spaced_mask=True,
)
_ROBERTA = Kind(
    "BPE", _byte_level, _roberta, names=_ROBERTA_NAMES, settings={"add_prefix_space": False, "trim_offsets": True}
)
_XLM_ROBERTA = Kind(
    "Unigram",
    partial(_unigram, unk_id=3),
    _template("bos_token", "eos_token", 2, 0),
    names=_ROBERTA_NAMES,
    settings={"add_prefix_space": True},
)
_CAMEMBERT = Kind(
    "Unigram",
    _unigram,
    _template("bos_token", "eos_token", 2, 0),
    names=_ROBERTA_NAMES,
    settings={"add_prefix_space": True},
    extra=("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"),
    spaced_mask=True,
)
AS_IS = Kind()
OF_CLASS = {
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "ConvBertTokenizer"), _BERT),
    **dict.fromkeys(("MobileBertTokenizer", "LayoutLMTokenizer", "LxmertTokenizer", "SqueezeBertTokenizer"), _BERT),
    "MPNetTokenizer": _MPNET,
    **dict.fromkeys(("RobertaTokenizer", "LongformerTokenizer"), _ROBERTA),
    "XLMRobertaTokenizer": _XLM_ROBERTA,
    "CamembertTokenizer": _CAMEMBERT,
    **dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend"), AS_IS),
}
OF_MODEL = {
    **dict.fromkeys(("bert", "distilbert", "electra"), _BERT),
    "mpnet": _MPNET,
    "roberta": _ROBERTA,
    "xlm-roberta": _XLM_ROBERTA,
    "camembert": _CAMEMBERT,
}


def build_tokenizer(
    kind: Kind,
    vocabulary: Any,
    settings: Mapping[str, Any] | None = None,
    names: Mapping[str, Token] | None = None,
    added: Sequence[AddedToken] = (),
    extra: Sequence[Token] = (),
) -> Tokenizer:
    """The tokenizer of a class.

    Args:
        kind: the class.
        vocabulary: as `kind.build` takes it; the tokenizer itself if the class is read as it is.
        settings: settings that differ from the defaults of the class.
        names: special tokens by role, or those of the class.
        added: added tokens in the order of their ids.
        extra: special tokens without a role.
    """
    settings, names = {**kind.settings, **(settings or {})}, kind.names if names is None else names
    tokenizer: Tokenizer = vocabulary if kind.build is None else kind.build(vocabulary, settings, names)
    _add_tokens(tokenizer, names, added, extra)
    if kind.process is not None:
        kind.process(tokenizer, settings, names)
    return tokenizer


def _add_tokens(
    tokenizer: Tokenizer, names: Mapping[str, Token], added: Sequence[AddedToken], extra: Sequence[Token]
) -> None:
    """Add tokens in the order of transformers, which gives those outside the vocabulary their ids."""
    from tokenizers import AddedToken

    present = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    tokens: list[Token] = [token for token in added if repr(token) not in same]
    known = {token.content for token in [*present, *added]}
    for token in [*names.values(), *extra]:
        if text_of(token) not in known and token not in tokens:
            tokens.append(token)
    named = {text_of(token) for token in names.values()}
    new = []
    for token in tokens:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif token.content in named:
            token.special = True
        new.append(token)
    tokenizer.add_tokens(new)
