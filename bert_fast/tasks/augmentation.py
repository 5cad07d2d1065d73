"""Augmentation of training rows: masked tokens; deleted, duplicated, swapped and replaced words.

The augmentation of a row is a function of (seed, epoch, row) alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_fast._text import read_lines
from bert_fast.data.tokenizer import mask_token
from bert_fast.tasks.alignment import is_cjk
from bert_fast.tasks.io.columns import text_column
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import AugmentSettings, TextSettings
from bert_fast.tasks.task import Columns, Example, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS, _TOKENS, _ROWS = 11, 12, 13  # independent random streams


class Augmenter:
    """Augments and encodes the training rows, anew in each epoch.

    Args:
        task, table, columns, tokenizer, text: as in `Task.encode`.
        settings: which augmentations, and how much of each.
        seed: of the run.

    Raises:
        ValueError: the settings augment words, on which the task's targets depend; the file of synonyms has no line
            with two words; or `mask` is set and the tokenizer has no mask token.
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
        if settings.of_words and not task.words_may_change:
            raise ValueError(
                f"augment changes words, on which the targets of {task.name} depend; expected only mask to be set"
            )
        self.task, self.table, self.columns, self.tokenizer, self.text = task, table, columns, tokenizer, text
        self.settings, self.seed = settings, seed
        self.synonyms = read_synonyms(Path(settings.synonyms)) if settings.synonyms is not None else {}
        added = tokenizer.get_added_tokens_decoder()
        self.special = np.array([number for number, token in added.items() if token.special], dtype=np.int64)
        self.mask_id = tokenizer.get_vocab()[mask_token(tokenizer)] if settings.mask else 0

    def examples(self, epoch: int) -> list[Example]:
        """The augmented examples of `epoch`."""
        selected = np.random.default_rng([self.seed, _ROWS, epoch]).random(len(self.table)) < self.settings.rows
        table = self.table
        if self.settings.of_words:
            for index, role in enumerate(self.task.text_roles):
                if role in self.columns:
                    column = self.columns[role]
                    texts = text_column(table, column)
                    table = table.with_column(column, self._change_texts(texts, selected, [epoch, index]))
        examples = self.task.encode(table, self.columns, self.tokenizer, self.text, training=True)
        return self._mask_tokens(examples, selected, epoch) if self.settings.mask else examples

    def _change_texts(self, texts: Sequence[str], selected: np.ndarray, stream: Sequence[int]) -> list[str]:
        return [
            change_words(text, self.settings, self.synonyms, np.random.default_rng([self.seed, _WORDS, *stream, row]))
            if selected[row]
            else text
            for row, text in enumerate(texts)
        ]

    def _mask_tokens(self, examples: Sequence[Example], selected: np.ndarray, epoch: int) -> list[Example]:
        masked = []
        for number, example in enumerate(examples):
            if selected[example.row]:
                ids = np.asarray(example.input_ids, dtype=np.int64)
                random = np.random.default_rng([self.seed, _TOKENS, epoch, number])
                chosen = (random.random(len(ids)) < self.settings.mask) & ~np.isin(ids, self.special)
                example = replace(example, input_ids=np.where(chosen, self.mask_id, ids).tolist())
            masked.append(example)
        return masked


def change_words(
    text: str, settings: AugmentSettings, synonyms: Mapping[str, Sequence[str]], random: np.random.Generator
) -> str:
    """Replace, delete, duplicate and swap words of `text`, in this order; at least one word remains.

    Args:
        text: split into words at spaces, or into characters if it is mostly Chinese or Japanese.
        settings: the share of words for each change.
        synonyms: lower-case word -> its synonyms.
        random: the generator that decides.
    """
    by_characters = 2 * sum(map(is_cjk, text)) > len(text)
    words = list(text.strip()) if by_characters else text.split()
    if not words:
        return text
    if settings.synonym:
        for index in np.flatnonzero(random.random(len(words)) < settings.synonym):
            if others := synonyms.get(words[index].lower()):
                words[index] = others[int(random.integers(len(others)))]
    if settings.delete:
        kept = random.random(len(words)) >= settings.delete
        kept[int(random.integers(len(words)))] |= not kept.any()
        words = [word for word, keep in zip(words, kept, strict=True) if keep]
    if settings.duplicate:
        duplicated = random.random(len(words)) < settings.duplicate
        words = [word for word, twice in zip(words, duplicated, strict=True) for _ in range(1 + int(twice))]
    if settings.swap:
        # A swap moves two words.
        for _ in range(int(random.binomial(len(words), settings.swap / 2))):
            first, second = random.integers(len(words), size=2)
            words[first], words[second] = words[second], words[first]
    return ("" if by_characters else " ").join(words)


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Read a file of synonyms: lower-case word -> the other words of its lines.

    Raises:
        ValueError: the file is not UTF-8, or no line has two words.
    """
    synonyms: dict[str, list[str]] = {}
    for _, line in read_lines(path):
        words = [word.strip() for word in line.split(",") if word.strip()]
        for word in words:
            others = synonyms.setdefault(word.lower(), [])
            others += [other for other in words if other != word and other not in others]
    synonyms = {word: others for word, others in synonyms.items() if others}
    if not synonyms:
        raise ValueError(f"{path} has no line with two words; expected lines such as 'good, fine, great'")
    return synonyms
