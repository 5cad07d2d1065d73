"""Training rows changed a little, differently in each epoch: masked tokens; words left out, doubled, swapped, replaced.

What happens to a row is a function of (seed, epoch, row) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_fast.data.tokenizer import mask_token
from bert_fast.tasks.alignment import is_cjk
from bert_fast.tasks.io.columns import texts
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import AugmentSettings, TextSettings
from bert_fast.tasks.task import Columns, Example, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS, _TOKENS, _ROWS = 11, 12, 13  # streams of random numbers, so that one does not depend on another


class Augmenter:
    """The examples of the training rows in each epoch.

    Args:
        task, table, columns, tokenizer, text: as `Task.encode` takes them.
        settings: what is done.
        seed: of the run.

    Raises:
        ValueError: words would be changed, and the task's targets depend on where they are; the file of synonyms has no
            line with two words; or `mask` is set and the tokenizer has no mask token.
    """

    def __init__(
        self,
        task: Task,
        table: Table,
        columns: Columns,
        tokenizer: Tokenizer,
        text: TextSettings,
        settings: AugmentSettings,
        seed: int,
    ) -> None:
        if settings.of_words and not task.words_are_free:
            raise ValueError(f"augment changes words, and the targets of {task.name} depend on them; only mask can be")
        self.task, self.table, self.columns, self.tokenizer, self.text = task, table, columns, tokenizer, text
        self.settings, self.seed = settings, seed
        self.synonyms = read_synonyms(Path(settings.synonyms)) if settings.synonyms is not None else {}
        added = tokenizer.get_added_tokens_decoder()
        self.special = np.array([number for number, token in added.items() if token.special], dtype=np.int64)
        self.mask_id = tokenizer.get_vocab()[mask_token(tokenizer)] if settings.mask else 0

    def examples(self, epoch: int) -> list[Example]:
        """The examples of `epoch`."""
        changed = np.random.default_rng([self.seed, _ROWS, epoch]).random(len(self.table)) < self.settings.rows
        table = self.table
        if self.settings.of_words:
            for place, role in enumerate(self.task.text_roles):
                if role in self.columns:
                    column = self.columns[role]
                    table = table.with_column(column, self._texts(texts(table, column), changed, epoch, place))
        found = self.task.encode(table, self.columns, self.tokenizer, self.text, training=True)
        return self._masked(found, changed, epoch) if self.settings.mask else found

    def _texts(self, found: Sequence[str], changed: np.ndarray, epoch: int, place: int) -> list[str]:
        stream = [self.seed, _WORDS, epoch, place]
        return [
            change_words(text, self.settings, self.synonyms, np.random.default_rng([*stream, row]))
            if changed[row]
            else text
            for row, text in enumerate(found)
        ]

    def _masked(self, examples: Sequence[Example], changed: np.ndarray, epoch: int) -> list[Example]:
        found = []
        for number, example in enumerate(examples):
            if changed[example.row]:
                ids = np.asarray(example.input_ids, dtype=np.int64)
                random = np.random.default_rng([self.seed, _TOKENS, epoch, number])
                chosen = (random.random(len(ids)) < self.settings.mask) & ~np.isin(ids, self.special)
                example = replace(example, input_ids=np.where(chosen, self.mask_id, ids).tolist())
            found.append(example)
        return found


def change_words(
    text: str, settings: AugmentSettings, synonyms: Mapping[str, Sequence[str]], random: np.random.Generator
) -> str:
    """`text` with words replaced, left out, doubled and swapped, in this order; never without a word.

    Args:
        synonyms: word, in lower case -> the others of its line.
    """
    by_characters = 2 * sum(map(is_cjk, text)) > len(text)
    words = list(text.strip()) if by_characters else text.split()
    if not words:
        return text
    if settings.synonym:
        for place in np.flatnonzero(random.random(len(words)) < settings.synonym):
            if others := synonyms.get(words[place].lower()):
                words[place] = others[int(random.integers(len(others)))]
    if settings.delete:
        kept = random.random(len(words)) >= settings.delete
        kept[int(random.integers(len(words)))] |= not kept.any()
        words = [word for word, stays in zip(words, kept, strict=True) if stays]
    if settings.duplicate:
        twice = random.random(len(words)) < settings.duplicate
        words = [word for word, double in zip(words, twice, strict=True) for _ in range(1 + int(double))]
    if settings.swap:
        # A swap moves two words.
        for _ in range(int(random.binomial(len(words), settings.swap / 2))):
            first, second = random.integers(len(words), size=2)
            words[first], words[second] = words[second], words[first]
    return ("" if by_characters else " ").join(words)


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Word, in lower case -> the other words of its lines.

    Raises:
        ValueError: no line has two words.
    """
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        for word in words:
            others = found.setdefault(word.lower(), [])
            others += [other for other in words if other != word and other not in others]
    found = {word: others for word, others in found.items() if others}
    if not found:
        raise ValueError(f"{path} has no line with two words; expected lines such as 'good, fine, great'")
    return found
