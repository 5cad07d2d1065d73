"""Scores of a cross-encoder: a query and each of several texts, read together by a classifier of one label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_fast._progress import ProgressBar
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import WINDOW, batches_by_length, pack
from bert_fast.models.loading import check_flags
from bert_fast.models.sentence import SentenceModules, activation_of
from bert_fast.models.texts import (
    as_iterable,
    as_tokenizer,
    check_integer_argument,
    check_text,
    evaluating,
    text_windows,
)

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

Pair = tuple[list[int], list[int]]  # token ids and type ids
_SIGMOID = "torch.nn.modules.activation.Sigmoid"


class PairTemplate(NamedTuple):
    """The special tokens that a tokenizer puts around two texts, and the type ids of all tokens."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[int, int, int, int, int]  # of before, the first text, between, the second text, after

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> PairTemplate:
        """ValueError where the tokenizer does not put two texts one after the other."""
        encoding = tokenizer.encode("a", "a")
        first, second = (sorted(i for i, n in enumerate(encoding.sequence_ids) if n == part) for part in (0, 1))
        spans = [list(range(part[0], part[-1] + 1)) if part else [] for part in (first, second)]
        if not first or not second or spans != [first, second] or first[-1] >= second[0]:
            raise ValueError("the tokenizer does not put the tokens of two texts one after the other")
        ids, types = encoding.ids, encoding.type_ids
        edges = (first[0], first[-1] + 1, second[0], second[-1] + 1)

        def kind(start: int, end: int) -> int:
            found = set(types[start:end]) or {0}
            if len(found) > 1:
                raise ValueError("the tokenizer gives the special tokens beside each other different type ids")
            return found.pop()

        parts = ((0, edges[0]), (edges[0], edges[1]), (edges[1], edges[2]), (edges[2], edges[3]), (edges[3], len(ids)))
        return cls(
            ids[: edges[0]],
            ids[edges[1] : edges[2]],
            ids[edges[3] :],
            tuple(kind(*part) for part in parts),  # type: ignore[arg-type]
        )

    @property
    def special(self) -> int:
        """The number of special tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def __call__(self, first: list[int], second: list[int], longest: int) -> tuple[list[int], list[int]]:
        """The ids and type ids of a pair, of whose texts the longer is truncated first."""
        bound = longest if _truncates_each_text_first() else max(len(first), len(second))
        sizes = _longest_first(min(len(first), bound), min(len(second), bound), longest - self.special)
        parts = (self.before, first[: sizes[0]], self.between, second[: sizes[1]], self.after)
        ids = [token for part in parts for token in part]
        return ids, [kind for kind, part in zip(self.types, parts, strict=True) for _ in part]


def _longest_first(first: int, second: int, size: int) -> tuple[int, int]:
    """The lengths of two texts in `size` tokens, as `tokenizers` truncates with the strategy longest_first."""
    if first + second <= size:
        return first, second
    short, long = sorted((first, second))
    long = short if short > size else max(short, size - short)
    if short + long > size:
        short = size // 2
        long = short + size % 2
    return (short, long) if first <= second else (long, short)


@cache
def _truncates_each_text_first() -> bool:
    """Whether `tokenizers` truncates each text by itself before the pair, as 0.23.2 does and 0.23.3 does not.

    Two texts that are then of one length give the odd token to the second, where else the longer one has it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(1, strategy="longest_first")
    return bool(tokenizer.encode("a a", "a").sequence_ids == [1])


def rerank(
    model: nn.Module,
    tokenizer: Any,
    query: str,
    texts: str | Iterable[str],
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    activation: str | None = None,
    max_seqlen: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    convert_to_numpy: bool = False,
    show_progress_bar: bool | None = False,
    modules: SentenceModules | None = None,
) -> Tensor | np.ndarray[Any, Any]:
    """Score texts for a query. `BertForSequenceClassification.rerank` calls this with the model's tokenizer.

    Pairs of a query and a text are tokenized `WINDOW` at a time, sorted by length and packed, as in `encode`. Threads
    may share one model that is in eval mode, and one tokenizer.

    Args:
        model: a BertForSequenceClassification with one label.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one.
        query: the first text of each pair.
        texts: the second texts: a sequence of str, an iterator, a Series, an array; or one str.
        prompt: a text put before the query; "" for none.
        prompt_name: the name of one of the prompts of `modules`; None for its default prompt, if it has one.
        activation: of the scores, by its name in torch, such as "torch.nn.Identity" for the logits; None for that of
            the model's folder, or Sigmoid.
        max_seqlen: of pairs with more tokens the longer text is truncated first; None for that of `modules`, or the
            model's maximum.
        batch_tokens: pairs of similar length are packed up to this; a longer pair is a batch by itself.
        batch_size: the maximum number of pairs in a batch; None for any number.
        convert_to_numpy: return a NumPy array.
        show_progress_bar: on stderr, with tqdm.
        modules: what the model's folder says about texts.

    Returns:
        (number of texts,) float32 on the CPU, in the order of `texts`; a higher score is a better text. () for a str.

    Raises:
        TypeError: the model is another, or a text is no str, by its index; or an argument has another type.
        ValueError: the model has several labels, a number is out of range, or there is no such prompt or activation.
    """
    modules = modules or SentenceModules()
    modules.check()
    check_flags(convert_to_numpy=convert_to_numpy, show_progress_bar=show_progress_bar or False)
    check_integer_argument("batch_tokens", batch_tokens, 1)
    if batch_size is not None:
        check_integer_argument("batch_size", batch_size, 1)
    options: Any = {"prompt": prompt, "prompt_name": prompt_name, "max_seqlen": max_seqlen}
    tokens = PairTokens.of(model, tokenizer, query, modules, **options)
    config: Any = model.config
    activation_of(activation or activation_name(config.extra, modules), "rerank")
    texts = [texts] if (single := isinstance(texts, str)) else as_iterable(texts)
    count = len(texts) if isinstance(texts, Sized) else None
    parts = [torch.empty(0)]
    with evaluating(model), ProgressBar(count, shown=bool(show_progress_bar), unit="text", required=True) as bar:
        for window in text_windows(texts, WINDOW):
            parts.append(
                score_pairs(
                    model,
                    tokens(window),
                    modules=modules,
                    activation=activation,
                    batch_tokens=batch_tokens,
                    batch_size=batch_size,
                    progress=bar.update,
                )
            )
    out = torch.cat(parts)
    out = out[0] if single else out
    return out.numpy() if convert_to_numpy else out


@dataclass(frozen=True)
class PairTokens:
    """A query and texts to pairs of token ids and type ids, cut to a maximum length; threads may share it."""

    tokenizer: Tokenizer
    template: PairTemplate
    query: list[int]
    longest: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        query: str,
        modules: SentenceModules,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        max_seqlen: int | None = None,
    ) -> PairTokens:
        """The arguments are those of `rerank`, and so are the errors."""
        from bert_fast.data.tokenizer import check_rows  # tokenizers is optional
        from bert_fast.models.heads import BertForSequenceClassification

        if not isinstance(model, BertForSequenceClassification):
            raise TypeError(f"model is {type(model).__name__}; expected bert_fast's BertForSequenceClassification")
        if model.num_labels != 1:
            raise ValueError(f"the model has {model.num_labels} labels; expected one, the score of a pair")
        check_text(query, "query")
        tokenizer = as_tokenizer(tokenizer)
        check_rows(tokenizer, model.config.vocab_size, "rerank")
        template, longest = PairTemplate.of(tokenizer), longest_input(model.config)
        if max_seqlen is not None:
            check_integer_argument("max_seqlen", max_seqlen, template.special + 2, longest, ", the model's maximum")
        longest = max_seqlen or modules.max_seqlen or longest
        prompted = modules.prompt_of(prompt, prompt_name) + query
        return cls(tokenizer, template, tokenizer.encode(prompted, add_special_tokens=False).ids, longest)

    def __call__(self, texts: list[str]) -> list[Pair]:
        """The token ids and type ids of the query and each text."""
        seconds = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self.template(self.query, second.ids, self.longest) for second in seconds]


def score_pairs(
    model: Any,
    pairs: Sequence[Pair],
    *,
    modules: SentenceModules | None = None,
    activation: str | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Score pairs, as `PairTokens` returns them; threads may share a model that is in eval mode.

    Args:
        model, modules, activation, batch_tokens, batch_size: see `rerank`.
        pairs: the token ids and type ids of each pair, in any order.
        progress: called after each batch with its number of pairs.

    Returns:
        (number of pairs,) float32 on the CPU, in the order of `pairs`.
    """
    score = activation_of(activation or activation_name(model.config.extra, modules or SentenceModules()), "rerank")
    device = next(model.parameters()).device
    with torch.inference_mode(False):
        logits = torch.empty(len(pairs))
    with evaluating(model), torch.inference_mode():
        for indices in batches_by_length([len(ids) for ids, _ in pairs], batch_tokens, batch_size):
            inputs = pack([pairs[index][0] for index in indices], device)
            types = [kind for index in indices for kind in pairs[index][1]]
            inputs["token_type_ids"] = torch.tensor(types, device=device)
            logits[torch.tensor(indices)] = model(**inputs, return_dict=True).logits[:, 0].float().cpu()
            if progress is not None:
                progress(len(indices))
    with torch.inference_mode(False):
        scores: Tensor = score(logits)
        return scores


def activation_name(extra: dict[str, Any], modules: SentenceModules) -> str:
    """The activation that a cross-encoder's files name: config_sentence_transformers.json, or its config.json."""
    settings = extra.get("sentence_transformers")
    own = settings.get("activation_fn") if isinstance(settings, dict) else None
    return modules.activation or own or extra.get("sbert_ce_default_activation_function") or _SIGMOID
