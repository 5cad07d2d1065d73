"""Which tokens an answer comes from: attention rollout, and integrated gradients through captum.

Answers are a text's class or number, a word's label, and where the answer to a question starts.

Rollout (Abnar and Zuidema, "Quantifying attention flow in transformers", 2020) multiplies the attention of all layers,
half of each being the residual connection; it says where information could flow from, not in favour of what.
Integrated gradients (Sundararajan et al., "Axiomatic attribution for deep networks", 2017) share out the difference
between the logit of the text and that of the same text with every word replaced by [PAD]: they have a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.tasks.encoding import encode_parts
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Example, Task

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Array = np.ndarray[Any, Any]
TASKS = ("classification", "multi-label", "regression", "token-classification", "question-answering")
_DETAILS = ("scores", "probabilities", "n_best", "start", "end", "score", "null_difference")  # not for the page
_STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; color: #222; max-width: 55em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } section { border-top: 1px solid #ddd; margin-top: 1.5em } .quiet { color: #666 }
span { padding: .15em 0; border-radius: .2em }
"""


@dataclass(frozen=True)
class Explanation:
    """What the S tokens of one input have to do with one logit.

    Attributes:
        texts: the text, the two of a pair, or question and context.
        tokens: as the model read them, special ones included.
        places: (which of `texts`, start, end) of each in characters; None for special tokens.
        label: whose logit it is: a label, a label of a word, the start of an answer; "" for a number.
        prediction: of the task, for the whole text.
        rollout: (S,) shares of the attention that the vector of the logit is made of; their sum is 1.
        gradients: (S,) integrated gradients.
        logit, baseline: with the text, and with [PAD] for every word; gradients sum up to the difference, nearly.
        windows: of a long text with text.long=windows, how many there are; the first is explained.
    """

    texts: Sequence[str]
    tokens: Sequence[str]
    places: Sequence[tuple[int, int, int] | None]
    label: str
    prediction: dict[str, Any]
    rollout: Array
    gradients: Array
    logit: float
    baseline: float
    windows: int


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """The share of every token in every other after all layers: (S, S), each row's sum is 1.

    Args:
        attentions: a layer's probabilities each, (N, S, S).
    """
    size = attentions[0].shape[-1]
    identity = torch.eye(size, dtype=attentions[0].dtype, device=attentions[0].device)
    found = identity
    for probabilities in attentions:
        found = (probabilities.mean(0) + identity) / 2 @ found
    return found


class Target(NamedTuple):
    """A logit: that of a label at a token, at a token alone (the start of an answer), or of a label for the text."""

    name: str
    token: int | None
    label: int | None

    def logits(self, out: Any) -> Tensor:
        """(B,): of the output of a model for B inputs."""
        found: Tensor = out.start_logits if self.label is None else out.logits[..., self.label]
        return found if self.token is None else found[:, self.token]


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

    Of a token classifier it is that of the word which is surest to have a label (any but the one of words outside);
    in question answering that of the answer's start.

    Args:
        model: one of ours, as bert-fast finetune wrote it; in eval mode.
        texts: one, or two.
        text: how texts become tokens.
        label: whose logit; the one that is predicted, or the likeliest, if None. Of a token classifier at the word
            where it is likeliest.
        steps: between the baseline and the text, of the integral.

    Raises:
        ValueError: the task is not one of `TASKS`, or has no such label; the number of texts is not the task's; words
            or an answer are looked for in a text that is longer than the model reads at once.
    """
    if task.name not in TASKS:
        raise ValueError(f"the model is of the task {task.name}; expected one of {', '.join(TASKS)}")
    labels: list[str] = getattr(task, "labels", [])
    if label is not None and label not in labels:
        raise ValueError(f"label is {label!r}; expected one of {', '.join(labels) or 'none: the model has no labels'}")
    table, columns = _row(task, texts)
    parts = encode_parts(tokenizer, [texts[0]], [texts[1]] if len(texts) > 1 else None, text)[0]
    encoding = parts[0]
    device = next(model.parameters()).device
    ids, types = (torch.tensor([x], device=device) for x in (encoding.ids, encoding.type_ids))
    types = types.clamp(max=max(model.config.type_vocab_size - 1, 0))  # as in `run_model`
    with torch.no_grad():
        out = model(input_ids=ids, token_type_ids=types, output_attentions=True)
    prediction = predict(model, task, tokenizer, table, columns, text=text)[0]
    if task.name in ("token-classification", "question-answering"):
        examples = task.encode(table, columns, tokenizer, text, training=False)
        if [list(example.input_ids) for example in examples] != [encoding.ids]:
            raise ValueError(
                f"the task {task.name} reads this text in windows of {text.max_length} tokens, or its words as other "
                "tokens than the text as a whole has; expected one that is read at once"
            )
        if task.name == "question-answering":
            target = _start(encoding, prediction)
        else:
            target = _surest(out.logits[0], task, examples[0], encoding, texts[0], label)
    else:
        column = labels.index(label) if label is not None else int(out.logits[0].argmax())
        target = Target(labels[column] if labels else "", None, column)
    shares = rollout([one[0].float() for one in out.attentions])
    # Of the token; or of all where the head pools over them; or of the first.
    token = 0 if target.token is None else target.token
    shares = shares.mean(0) if target.token is None and model.reductions else shares[token]
    gradients, baseline = _gradients(model, ids, types, encoding, target, steps)
    return Explanation(
        texts=texts,
        tokens=encoding.tokens,
        places=_places(encoding),
        label=target.name,
        prediction=prediction,
        rollout=shares.cpu().numpy(),
        gradients=gradients.cpu().numpy(),
        logit=float(target.logits(out)),
        baseline=baseline,
        windows=len(parts),
    )


def _row(task: Task, texts: Sequence[str]) -> tuple[Table, dict[str, str]]:
    """A table of one row with the texts in the task's columns."""
    names = {"token-classification": ["tokens"], "question-answering": ["question", "context"]}
    columns = names.get(task.name, ["text", "text_pair"][: len(texts)])
    if len(columns) != len(texts):
        raise ValueError(f"{len(texts)} texts came; the task {task.name} takes {' and '.join(columns)}")
    return Table({name: [text] for name, text in zip(columns, texts, strict=True)}), {name: name for name in columns}


def _start(encoding: Encoding, prediction: dict[str, Any]) -> Target:
    """The start of the best answer, also where none is the better one."""
    best = next((one for one in prediction["n_best"] if one["start"] is not None), None)
    if best is None:
        raise ValueError("the context has no answer to explain; expected one with words")
    places = enumerate(_places(encoding))
    token = next(token for token, at in places if at is not None and at[0] == 1 and at[2] > best["start"])
    return Target(f"the start of {best['answer']!r}", token, None)


def _surest(logits: Tensor, task: Any, example: Example, encoding: Encoding, text: str, label: str | None) -> Target:
    """The word and label of the highest probability, at the word's first token."""
    columns = [i for i, one in enumerate(task.labels) if (one == label if label is not None else one != task.fallback)]
    places = [place for _, place in example.extra]
    if not places:
        raise ValueError("the text has no words; expected some")
    found = logits.softmax(-1)[places][:, columns]
    row, column = divmod(int(found.argmax()), len(columns))
    end = next((place for place in places if place > places[row]), encoding.special_tokens_mask.index(1, places[row]))
    word = text[encoding.offsets[places[row]][0] : encoding.offsets[end - 1][1]].strip()
    return Target(f"{task.labels[columns[column]]} of {word!r}", places[row], columns[column])


def _places(encoding: Encoding) -> list[tuple[int, int, int] | None]:
    pairs = zip(encoding.sequence_ids, encoding.offsets, strict=True)
    return [None if which is None else (which, start, end) for which, (start, end) in pairs]


def _gradients(
    model: Any, ids: Tensor, types: Tensor, encoding: Encoding, target: Target, steps: int
) -> tuple[Tensor, float]:
    """(S,) integrated gradients from [PAD] in the place of every word, and the logit there."""
    from captum.attr import IntegratedGradients

    table = model.get_input_embeddings()
    pad = model.config.pad_token_id or 0
    special = torch.tensor(encoding.special_tokens_mask, dtype=torch.bool, device=ids.device)
    with torch.no_grad():
        inputs, baseline = table(ids), table(torch.where(special, ids, pad))

    def logits(embeds: Tensor, token_type_ids: Tensor) -> Tensor:
        return target.logits(model(inputs_embeds=embeds, token_type_ids=token_type_ids))

    found = IntegratedGradients(logits).attribute(
        inputs,
        baselines=baseline,
        additional_forward_args=(types,),
        n_steps=steps,
        internal_batch_size=max(1, 4096 // ids.shape[1]),
    )
    with torch.no_grad():
        start = float(logits(baseline, types))
    return found[0].sum(-1).detach(), start


def page(explanations: Sequence[Explanation], title: str) -> str:
    """One HTML page that needs no network: each text twice, coloured by rollout and by integrated gradients."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="quiet">Attention: the darker, the more of the vector that is judged comes from there. '
        "Gradients: blue speaks for the label, orange against it. Neither is a proof of why.</p>",
    ]
    for one in explanations:
        what = one.label or "the value"
        shown = ", ".join(f"{name} {_short(value)}" for name, value in one.prediction.items() if name not in _DETAILS)
        rest = f" First of {one.windows} windows." if one.windows > 1 else ""
        special = sum(share for share, place in zip(one.rollout, one.places, strict=True) if place is None)
        parts.append(
            f"<section><p><b>{escape(shown)}</b><br>"
            f'<span class="quiet">Explained: {escape(what)}, logit {one.logit:.3f}, without words {one.baseline:.3f}. '
            f"Special tokens have {special:.0%} of the attention.{rest}</span></p>"
            f"<p>Attention: {_coloured(one, one.rollout)}</p>"
            f"<p>Gradients: {_coloured(one, one.gradients)}</p></section>"
        )
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(f"{x['text']} ({x['kind']})" if isinstance(x, dict) else str(x) for x in value) or "none"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _coloured(explanation: Explanation, values: Array) -> str:
    """The texts with each token's characters on a colour; special tokens, which no character shows, take no part."""
    shown = [abs(x) for x, place in zip(values, explanation.places, strict=True) if place is not None]
    largest = max(shown, default=0.0) or 1.0
    found = []
    for number, text in enumerate(explanation.texts):
        done, html = 0, ""
        for value, place in zip(values, explanation.places, strict=True):
            if place is None or place[0] != number or place[2] <= done:
                continue
            start = max(place[1], done)
            colour = "27,108,168" if value >= 0 else "217,130,43"
            style = f"background:rgba({colour},{abs(value) / largest * 0.8:.2f})"
            html += escape(text[done:start])
            html += f'<span style="{style}" title="{value:.4f}">{escape(text[start : place[2]])}</span>'
            done = place[2]
        found.append(html + escape(text[done:]))
    return " &#8214; ".join(found)
