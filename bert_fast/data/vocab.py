"""BERT's WordPiece vocabulary: training, loading and saving.

A folder has `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`, which AutoTokenizer of transformers also reads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_fast.data.host_numpy import CONTINUATION, SPECIAL, Array

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_vocab(
    sentences: Iterable[str], *, vocab_size: int = 8192, lowercase: bool = True, alphabet_size: int = 1000
) -> Tokenizer:
    """Train a WordPiece vocabulary, deterministically.

    Args:
        sentences: the text; iterated over twice.
        vocab_size: maximum number of tokens, including the special ones, whose ids are 0 to 4.
        lowercase: lower-case the text and strip accents first, as bert-base-uncased does.
        alphabet_size: maximum number of characters; rarer ones become [UNK]. Chinese text has about 8000.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `vocab_size` is too small for the alphabet of the text.
    """
    from tokenizers import trainers

    tokenizer = _bert_tokenizer({token: i for i, token in enumerate(SPECIAL_TOKENS)}, lowercase)
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(tokenizer.normalizer.normalize_str(sentence))
    counts = Counter({character: count for character, count in counts.items() if not character.isspace()})
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:alphabet_size])
    # The trainer numbers characters in the order of a hash map, and breaks ties by number. Passed as special tokens,
    # they are numbered in the order passed, which makes training deterministic.
    # The normalizer puts spaces around a Chinese character, so it never continues a word.
    inner = [character for character in alphabet if " " not in tokenizer.normalizer.normalize_str(character)]
    letters = [*alphabet, *(f"##{character}" for character in inner)]
    if vocab_size < len(SPECIAL_TOKENS) + len(letters):
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {len(SPECIAL_TOKENS) + len(letters)}: the text has "
            f"{len(alphabet)} different characters, {len(inner)} of them two tokens each (alone and after ##), and "
            f"{len(SPECIAL_TOKENS)} tokens are special"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *letters],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return _bert_tokenizer(tokenizer.get_vocab(), lowercase)


def load_wordpiece(path: str | Path) -> Tokenizer:
    """Load a BERT tokenizer from a folder, a `tokenizer.json` or a `vocab.txt`.

    A `vocab.txt` is lower-case unless `tokenizer_config.json` in the same folder has `"do_lower_case": false`.

    Raises:
        ValueError: there is no such file, it can't be read, or it is not BERT's WordPiece.
    """
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in ("tokenizer.json", "vocab.txt") if (file / name).is_file()), file)
    if not file.is_file():
        raise ValueError(f"{path}: expected a tokenizer.json, a vocab.txt or a folder with one of them")
    if file.suffix != ".json":
        return _from_vocab_txt(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from error
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model.get("continuing_subword_prefix") != "##":
        raise ValueError(f"{file}: a {model['type']} tokenizer; expected BERT's WordPiece with '##' continuations")
    _check_special(file, tokenizer.get_vocab())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_vocab_txt(file: Path) -> Tokenizer:
    vocab: dict[str, int] = {}
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines):
        token = line.removesuffix("\r")
        if token in vocab:
            raise ValueError(f"{file}, line {number + 1}: {token!r} repeats line {vocab[token] + 1}")
        vocab[token] = number
    _check_special(file, vocab)
    lowercase = True
    config = file.parent / "tokenizer_config.json"
    if config.is_file():
        try:
            lowercase = bool(json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", True))
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{config}: not a JSON object ({error})") from error
    return _bert_tokenizer(vocab, lowercase)


def _check_special(file: Path, vocab: dict[str, int]) -> None:
    if missing := [token for token in SPECIAL_TOKENS if token not in vocab]:
        raise ValueError(f"{file}: the vocabulary has no {', '.join(missing)}; BERT needs {' '.join(SPECIAL_TOKENS)}")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{file}: the ids of the {len(vocab)} tokens are not 0 to {len(vocab) - 1}")


def _bert_tokenizer(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def is_lowercase(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer lower-cases text."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    return bool(normalizer.get("lowercase") or normalizer.get("type") == "Lowercase")


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, *, model_max_length: int = 512) -> None:
    """Write `vocab.txt`, `tokenizer.json` and `tokenizer_config.json`.

    Args:
        tokenizer: the tokenizer.
        folder: an existing folder.
        model_max_length: maximum number of tokens of the model, for transformers.
    """
    folder = Path(folder)
    tokens = tokenizer.get_vocab()
    (folder / "vocab.txt").write_text(
        "".join(f"{token}\n" for token in sorted(tokens, key=tokens.__getitem__)), encoding="utf-8"
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": is_lowercase(tokenizer),
        "model_max_length": model_max_length,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def token_kinds(tokenizer: Tokenizer) -> Array:
    """`kinds` of `host_numpy.Masking`: whether each id is a `##` continuation or a special token, uint8 (V,)."""
    kinds = np.zeros(tokenizer.get_vocab_size(), dtype=np.uint8)
    for token, number in tokenizer.get_vocab().items():
        if token.startswith("##") and len(token) > 2:
            kinds[number] = CONTINUATION
        elif token in SPECIAL_TOKENS or token.startswith("[unused"):
            kinds[number] = SPECIAL
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            kinds[number] = SPECIAL
    return kinds
