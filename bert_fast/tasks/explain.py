"""Attribution of a prediction to tokens: attention rollout, and integrated gradients from captum.

The explained predictions are the class or value of a text, the label of a word, and the start of an answer.

Attention rollout (Abnar and Zuidema, "Quantifying attention flow in transformers", 2020) multiplies the attention
matrices of all layers, averaged with the identity for the residual connection; it shows where information can flow
from, but not its effect. Integrated gradients (Sundararajan et al., "Axiomatic attribution for deep networks", 2017)
attribute the difference between the logit of the text and that of a baseline, the text with every word replaced by
[PAD]; they are signed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.models.texts import as_tokenizer, evaluating
from bert_fast.tasks.encoding import encode_windows
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Example, Task

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Array = np.ndarray[Any, Any]
TASKS = ("classification", "multi-label", "regression", "token-classification", "question-answering")
_DETAILS = ("scores", "probabilities", "n_best", "start", "end", "score", "null_difference")  # omitted from the page
_STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; color: #222; max-width: 55em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } section { border-top: 1px solid #ddd; margin-top: 1.5em } .quiet { color: #666 }
span { padding: .15em 0; border-radius: .2em } .cut { color: #888; text-decoration: line-through }
"""


@dataclass(frozen=True)
class Explanation:
    """The attribution of one logit to the S tokens of an input.

    Attributes:
        texts: the text, the two of a pair, or question and context.
        tokens: the tokens of the input, including special tokens.
        spans: (index into `texts`, start, end) of each token in characters; None for special tokens.
        label: the explained logit: a label, the label of a word, or the start of an answer; "" for a number.
        prediction: of the task, for the complete text.
        rollout: (S,) the attention rollout of the logit's hidden state; sums to 1.
        gradients: (S,) integrated gradients; their sum approximates logit - baseline.
        logit: of the text.
        baseline: the logit with [PAD] in place of every word.
        windows: the number of windows of a long text with text.long=windows, of which the first is explained.
        cut: (index into `texts`, start, end) of each range of characters that was cut off, or is in other windows.
    """

    texts: Sequence[str]
    tokens: Sequence[str]
    spans: Sequence[tuple[int, int, int] | None]
    label: str
    prediction: dict[str, Any]
    rollout: Array
    gradients: Array
    logit: float
    baseline: float
    windows: int
    cut: Sequence[tuple[int, int, int]] = ()


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention rollout over all layers.

        R = prod over layers of (mean over heads of A + I) / 2

    Args:
        attentions: the attention probabilities of each layer, (N, S, S).

    Returns:
        (S, S): row i holds the share of every token in the output of token i; rows sum to 1.
    """
    size = attentions[0].shape[-1]
    identity = torch.eye(size, dtype=attentions[0].dtype, device=attentions[0].device)
    product = identity
    for probabilities in attentions:
        product = (probabilities.mean(0) + identity) / 2 @ product
    return product


class Target(NamedTuple):
    """A logit: of a label at a token, of a token (the start of an answer), or of a label of the text."""

    name: str
    token: int | None
    label: int | None

    def logits(self, out: Any) -> Tensor:
        """(B,): this logit in the output of a model for B inputs."""
        logits: Tensor = out.start_logits if self.label is None else out.logits[..., self.label]
        return logits if self.token is None else logits[:, self.token]


def explain(
    model: Any,
    task: Task,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    text: TextSettings,
    *,
    label: str | None = None,
    steps: int = 50,
) -> Explanation:
    """Explain one logit of `model` for a text, a pair of texts, or a question and its context.

    For token-classification this is the most probable label of a word, other than the outside label; for
    question-answering the start of the best answer.

    Args:
        model: a bert_fast model, as written by bert-fast finetune; runs in eval mode, and keeps the mode that it has.
        task: fitted, one of `TASKS`.
        tokenizer: of the model; from `load_tokenizer`, or transformers' fast one.
        texts: one or two.
        text: how texts are tokenized.
        label: the label to explain; the predicted one if None. For token-classification it is explained at the word
            with its highest probability.
        steps: of the integral from the baseline to the text.

    Returns:
        The attributions of all tokens, with the prediction.

    Raises:
        ValueError: the task is not one of `TASKS` or has no such label; the number of texts does not fit the task; or
            a text for token-classification or question-answering does not fit into one window.
    """
    if task.name not in TASKS:
        raise ValueError(f"the task of the model is {task.name}; expected one of {', '.join(TASKS)}")
    with evaluating(model):
        return _explain(model, task, as_tokenizer(tokenizer), texts, text, label, steps)


def _explain(
    model: Any,
    task: Task,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    text: TextSettings,
    label: str | None,
    steps: int,
) -> Explanation:
    labels: list[str] = getattr(task, "labels", [])
    if label is not None and label not in labels:
        raise ValueError(f"label is {label!r}; expected one of {', '.join(labels) or 'none: the model has no labels'}")
    table, columns = _one_row(task, texts)
    windows = encode_windows(tokenizer, [texts[0]], [texts[1]] if len(texts) > 1 else None, text)[0]
    encoding = windows[0]
    device = next(model.parameters()).device
    ids, types = (torch.tensor([x], device=device) for x in (encoding.ids, encoding.type_ids))
    types = types.clamp(max=max(model.config.type_vocab_size - 1, 0))  # as in `run_model`
    with torch.no_grad(), _quiet_about_attentions():
        out = model(input_ids=ids, token_type_ids=types, output_attentions=True)
    prediction = predict(model, task, tokenizer, table, columns, text=text)[0]
    if task.name in ("token-classification", "question-answering"):
        examples = task.encode(table, columns, tokenizer, text, training=False)
        if [list(example.input_ids) for example in examples] != [encoding.ids]:
            raise ValueError(
                f"{task.name} splits this text into windows of {text.max_length} tokens, or tokenizes it by words "
                "differently; expected a text of one window"
            )
        if task.name == "question-answering":
            target = _answer_start(encoding, prediction)
        else:
            target = _most_probable(out.logits[0], task, examples[0], encoding, texts[0], label)
    else:
        column = labels.index(label) if label is not None else int(out.logits[0].argmax())
        target = Target(labels[column] if labels else "", None, column)
    shares = rollout([layer[0].float() for layer in out.attentions])
    # The rollout of the token; of all tokens if the head pools over them; else of the first token.
    token = 0 if target.token is None else target.token
    shares = shares.mean(0) if target.token is None and model.reductions else shares[token]
    gradients, baseline = _gradients(model, ids, types, encoding, target, steps)
    return Explanation(
        texts=texts,
        tokens=encoding.tokens,
        spans=_spans(encoding),
        label=target.name,
        prediction=prediction,
        rollout=shares.cpu().numpy(),
        gradients=gradients.cpu().numpy(),
        logit=float(target.logits(out)),
        baseline=baseline,
        windows=len(windows),
        cut=_cut_ranges(tokenizer.encode(texts[0], texts[1] if len(texts) > 1 else None), encoding),
    )


@contextmanager
def _quiet_about_attentions() -> Iterator[None]:
    """Without the warning that `output_attentions` is slow: one text is explained, and it lands in the progress bar."""
    logger = logging.getLogger("bert_fast")

    def keep(record: logging.LogRecord) -> bool:
        return "output_attentions" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _one_row(task: Task, texts: Sequence[str]) -> tuple[Table, dict[str, str]]:
    """A table of one row with the texts in the columns of the task."""
    names = {"token-classification": ["tokens"], "question-answering": ["question", "context"]}
    columns = names.get(task.name, ["text", "text_pair"][: len(texts)])
    if len(columns) != len(texts):
        raise ValueError(f"{len(texts)} texts; expected {' and '.join(columns)} for the task {task.name}")
    return Table({name: [text] for name, text in zip(columns, texts, strict=True)}), {name: name for name in columns}


def _answer_start(encoding: Encoding, prediction: dict[str, Any]) -> Target:
    """The start of the best answer, even if no answer is predicted."""
    best = next((answer for answer in prediction["n_best"] if answer["start"] is not None), None)
    if best is None:
        raise ValueError("the context has no words; expected at least one to explain an answer")
    spans = enumerate(_spans(encoding))
    token = next(token for token, span in spans if span is not None and span[0] == 1 and span[2] > best["start"])
    return Target(f"the start of {best['answer']!r}", token, None)


def _most_probable(
    logits: Tensor, task: Any, example: Example, encoding: Encoding, text: str, label: str | None
) -> Target:
    """The word and label with the highest probability, at the word's first token."""
    columns = [
        i for i, name in enumerate(task.labels) if (name == label if label is not None else name != task.fallback)
    ]
    firsts = [position for _, position in example.extra]
    if not firsts:
        raise ValueError("the text has no words; expected at least one")
    probabilities = logits.softmax(-1)[firsts][:, columns]
    row, column = divmod(int(probabilities.argmax()), len(columns))
    first = firsts[row]
    end = next((position for position in firsts if position > first), encoding.special_tokens_mask.index(1, first))
    word = text[encoding.offsets[first][0] : encoding.offsets[end - 1][1]].strip()
    return Target(f"{task.labels[columns[column]]} of {word!r}", first, columns[column])


def _spans(encoding: Encoding) -> list[tuple[int, int, int] | None]:
    pairs = zip(encoding.sequence_ids, encoding.offsets, strict=True)
    return [None if text is None else (text, start, end) for text, (start, end) in pairs]


def _cut_ranges(complete: Encoding, encoding: Encoding) -> list[tuple[int, int, int]]:
    """The ranges of characters whose tokens are in the `complete` encoding only, as (index of the text, start, end)."""
    kept = {span for span in _spans(encoding) if span is not None}
    ranges: list[tuple[int, int, int]] = []
    adjacent = False
    for span in _spans(complete):
        cut = span is not None and span not in kept
        if cut and span is not None:
            if adjacent and ranges[-1][0] == span[0]:
                ranges[-1] = (span[0], ranges[-1][1], span[2])
            else:
                ranges.append(span)
        adjacent = cut
    return ranges


def _gradients(
    model: Any, ids: Tensor, types: Tensor, encoding: Encoding, target: Target, steps: int
) -> tuple[Tensor, float]:
    """(S,) integrated gradients from the baseline, and the logit of the baseline."""
    from captum.attr import IntegratedGradients

    table = model.get_input_embeddings()
    pad = model.config.pad_token_id or 0
    special = torch.tensor(encoding.special_tokens_mask, dtype=torch.bool, device=ids.device)
    with torch.no_grad():
        inputs, baseline = table(ids), table(torch.where(special, ids, pad))

    def logits(embeds: Tensor, token_type_ids: Tensor) -> Tensor:
        return target.logits(model(inputs_embeds=embeds, token_type_ids=token_type_ids))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's, about inputs that do not require gradients
        attributions = IntegratedGradients(logits).attribute(
            inputs,
            baselines=baseline,
            additional_forward_args=(types,),
            n_steps=steps,
            internal_batch_size=max(1, 4096 // ids.shape[1]),
        )
    with torch.no_grad():
        baseline_logit = float(logits(baseline, types))
    return attributions[0].sum(-1).detach(), baseline_logit


def page(explanations: Sequence[Explanation], title: str) -> str:
    """A self-contained HTML page: each text twice, coloured by rollout and by integrated gradients."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="quiet">Attention: darker tokens have a larger share in the classified hidden state. '
        "Gradients: blue tokens raise the logit, orange tokens lower it. Neither is a causal explanation.</p>",
    ]
    for explanation in explanations:
        items = explanation.prediction.items()
        prediction = ", ".join(f"{name} {_short(value)}" for name, value in items if name not in _DETAILS)
        special = sum(share for share, span in zip(explanation.rollout, explanation.spans, strict=True) if span is None)
        windows = f" First of {explanation.windows} windows." if explanation.windows > 1 else ""
        if explanation.cut:
            where = "in other windows" if explanation.windows > 1 else "cut off, not read by the model"
            windows += f' <span class="cut">Struck through</span>: {where}.'
        parts.append(
            f"<section><p><b>{escape(prediction)}</b><br>"
            f'<span class="quiet">Explained: {escape(explanation.label or "the value")}, '
            f"logit {explanation.logit:.3f}, baseline {explanation.baseline:.3f}. "
            f"Special tokens have {special:.0%} of the attention.{windows}</span></p>"
            f"<p>Attention: {_coloured(explanation, explanation.rollout)}</p>"
            f"<p>Gradients: {_coloured(explanation, explanation.gradients)}</p></section>"
        )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(f"{x['text']} ({x['kind']})" if isinstance(x, dict) else str(x) for x in value) or "none"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _coloured(explanation: Explanation, values: Array) -> str:
    """The texts as HTML, with the characters of each token on a background colour, and what was cut off struck through;
    special tokens are omitted."""
    magnitudes = [abs(x) for x, span in zip(values, explanation.spans, strict=True) if span is not None]
    largest = max(magnitudes, default=0.0) or 1.0
    fragments = []
    for index, text in enumerate(explanation.texts):
        marks = [("cut", span, 0.0) for span in explanation.cut if span[0] == index]
        tokens = zip(values, explanation.spans, strict=True)
        marks += [("token", span, value) for value, span in tokens if span is not None and span[0] == index]
        done, html = 0, ""
        for kind, span, value in sorted(marks, key=lambda mark: mark[1]):
            start = max(span[1], done)
            if span[2] <= done:
                continue
            html += escape(text[done:start])
            if kind == "cut":
                html += f'<span class="cut">{escape(text[start : span[2]])}</span>'
            else:
                colour = "27,108,168" if value >= 0 else "217,130,43"
                style = f"background:rgba({colour},{abs(value) / largest * 0.8:.2f})"
                html += f'<span style="{style}" title="{value:.4f}">{escape(text[start : span[2]])}</span>'
            done = span[2]
        fragments.append(html + escape(text[done:]))
    return " &#8214; ".join(fragments)
