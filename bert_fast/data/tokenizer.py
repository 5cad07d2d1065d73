"""Loads the tokenizer of a checkpoint of `bert_fast.models`.

WordPiece (BERT, DistilBERT, ELECTRA, MPNet), byte-level BPE (RoBERTa) and Unigram (XLM-RoBERTa, CamemBERT), with the
ids of transformers' AutoTokenizer, see `tokenizer_files`. A sentencepiece model is converted by transformers.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bert_fast.data.tokenizer_files import SENTENCEPIECE, TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The files that may describe a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE,
)
_CONVERTERS = ("transformers", "sentencepiece", "google.protobuf")
_MASKS = ("[MASK]", "<mask>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint from a folder, a `tokenizer.json` or a `vocab.txt`.

    The ids equal those of `AutoTokenizer.from_pretrained` of transformers 5: tokenizer_config.json,
    special_tokens_map.json and added_tokens.json in the same folder are followed.

    Args:
        path: a file, or a folder with `tokenizer.json`, else `vocab.txt`, else `vocab.json` and `merges.txt`, else
            `sentencepiece.bpe.model`. The last is converted by transformers (extra `tokenizers`).

    Returns:
        The tokenizer, without padding and truncation.

    Raises:
        ValueError: there is no such file, it can't be read, its class is unknown (BertJapaneseTokenizer, ...), or it
            adds no special tokens to a text.
        ImportError: a package required to convert a sentencepiece model is not installed.
    """
    files = TokenizerFiles.read(Path(path))
    return _checked(files.file, _converted(files.file) if files.file.is_dir() else files.tokenizer())


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
    """The tokenizer of a folder with a sentencepiece model alone."""
    # find_spec raises if the namespace package google is absent, so it is looked up first.
    absent = [name for name in _CONVERTERS if not find_spec(name.partition(".")[0]) or not find_spec(name)]
    if absent:
        raise ImportError(
            f"{folder} has {SENTENCEPIECE} and no tokenizer.json; {', '.join(absent)}, needed to convert it, is not "
            "installed: pip install 'bert_fast[tokenizers]'"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # of any kind, from three libraries
        raise ValueError(f"{folder}: {SENTENCEPIECE} can't be read ({error})") from error
    return tokenizer


def mask_token(tokenizer: Tokenizer) -> str:
    """The mask token: [MASK] or <mask>; of both (MPNet's vocabulary has both) the special one.

    Raises:
        ValueError: the tokenizer has none.
    """
    names = [name for name in _MASKS if tokenizer.token_to_id(name) is not None]
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    if names:
        return next((name for name in names if name in special), names[0])
    raise ValueError(f"the tokenizer has neither {' nor '.join(_MASKS)}")


def count_ids(tokenizer: Tokenizer) -> int:
    """The number of rows that a word embedding needs: the highest id plus one.

    It exceeds the number of tokens if lines of vocab.txt are equal.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_rows(tokenizer: Tokenizer, rows: int, where: str | Path) -> None:
    """Check that a tokenizer fits a model, which may have more rows than the tokenizer has tokens.

    Args:
        tokenizer: the tokenizer.
        rows: `vocab_size` of the model.
        where: the checkpoint, for the message.

    Raises:
        ValueError: the tokenizer has more ids than the model has rows.
    """
    if (count := count_ids(tokenizer)) > rows:
        raise ValueError(
            f"{where}: the tokenizer has {count} tokens and the model {rows} word embeddings; expected at most {rows} "
            "tokens: the model was not resized for added tokens, or the tokenizer belongs to another model"
        )
