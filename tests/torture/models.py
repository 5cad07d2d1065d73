"""Attacks on models: inputs of every architecture and head changed, compared with transformers in float64; `encode`.

A forward pass raises a clear error, or returns what transformers returns in float64 at the real tokens. `encode` raises
a clear error, or returns the mean of transformers' hidden states over the tokens of transformers' tokenizer.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.torture.attack import Attack, Broken, Case, require_clear
from tests.torture.tensors import change, guarded, wrong

SHAPE = (3, 13)


@functools.cache
def _models(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any, Any]:
    """Ours and transformers' fused in `dtype`, transformers' in it, and in float64 with the weights of that dtype."""
    import transformers

    import bert_fast

    warnings.simplefilter("ignore")
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    theirs_class = getattr(transformers, config.architectures[0])
    suffix = config.architectures[0].partition("For")[2]
    name = f"BertFor{suffix}" if suffix else "BertModel"
    if config.model_type == "electra" and suffix == "PreTraining":
        name = "ElectraForPreTraining"
    ours = getattr(bert_fast, name).from_pretrained(folder).to(dtype).eval()
    fused, eager, exact = (theirs_class.from_pretrained(folder, config=config).to(dtype).eval() for _ in range(3))
    return ours, bert_fast.fuse(fused), eager, exact.double()


def _inputs(case: Case, kind: str, model_type: str) -> dict[str, Any]:
    """A valid batch: some of the inputs, with a mask of some form."""
    rng = case.rng
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (SHAPE[0], 2, SHAPE[1]) if kind == "ForMultipleChoice" else SHAPE
    inputs: dict[str, Any] = {"input_ids": torch.randint(2, 61, shape, generator=generator)}
    form = rng.choice(["none", "right", "left", "holes", "one token"])
    mask = torch.ones(shape, dtype=torch.int64)
    if form == "right":
        mask[0, ..., 9:] = 0
    elif form == "left":
        mask[1, ..., :4] = 0
    elif form == "holes":
        mask[..., 1:] = torch.rand(*shape[:-1], shape[-1] - 1, generator=generator) < 0.6
    elif form == "one token":
        mask[..., 1:] = 0
    if form != "none":
        inputs["attention_mask"] = mask.to(rng.choice([torch.int64, torch.int32, torch.bool, torch.float32]))
    if model_type in ("bert", "electra") and rng.random() < 0.5:
        inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    if rng.random() < 0.2 and model_type != "distilbert":
        inputs["position_ids"] = torch.randint(2, 38, shape, generator=generator)
    if rng.random() < 0.4:
        words = torch.randint(0, 61, shape, generator=generator).masked_fill(
            torch.rand(shape, generator=generator) < 0.5, -100
        )
        labels: dict[str, dict[str, Tensor]] = {
            "ForMaskedLM": {"labels": words},
            "ForSequenceClassification": {"labels": torch.randint(0, 3, (3,), generator=generator)},
            "ForTokenClassification": {"labels": torch.where(words < 0, words, words % 3)},
            "ForMultipleChoice": {"labels": torch.randint(0, 2, (3,), generator=generator)},
            "ForQuestionAnswering": {
                "start_positions": torch.tensor([1, 3, 0]),
                "end_positions": torch.tensor([2, 7, 0]),
            },
            "ForNextSentencePrediction": {"labels": torch.randint(0, 2, (3,), generator=generator)},
        }
        inputs |= labels.get(kind, {})
    return inputs


def heads(case: Case, _: Any) -> None:
    """A forward pass with up to two inputs changed."""
    rng = case.rng
    folder = rng.choice(sorted(path for path in (case.material / "heads").glob("*/*")))
    model_type, kind = folder.parts[-2:]
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
    case.note(f"{model_type} {kind} {dtype}: loading")
    ours, fused, eager, exact = _models(folder, dtype)
    for model in (fused, eager, exact):  # transformers keeps what it inferred from the labels of an earlier call
        model.config.problem_type = None
    if rng.random() < 0.3:
        ours, kind_of = fused, "fused "
    else:
        kind_of = ""
    inputs = _inputs(case, kind, model_type)
    changes = []
    for name in rng.sample(sorted(inputs), min(len(inputs), rng.choice([0, 1, 1, 2]))):
        how, inputs[name] = change(inputs[name], rng)
        changes.append(f"{name} {how}")
    inputs = {
        name: guarded(x)
        if isinstance(x, Tensor) and x.is_contiguous() and x.layout == torch.strided and rng.random() < 0.3
        else x
        for name, x in inputs.items()
    }
    if rng.random() < 0.3:
        inputs["output_hidden_states"] = True
    what = f"{kind_of}{model_type} {kind}"
    case.note(f"{what} {str(dtype)[6:]} {sorted(inputs)}: {'; '.join(changes)}"[:600])
    trains = rng.random() < 0.3
    try:
        with torch.set_grad_enabled(trains):
            results = _flat(ours(**inputs))
    except Exception as error:
        if kind_of and changes:
            return  # transformers' own errors
        if not changes:
            raise Broken(f"{what}: refuses valid inputs: {type(error).__name__}: {error}") from error
        require_clear(error, what)
        return
    if any(isinstance(x, Tensor) and x.device.type == "meta" for x in inputs.values()):
        return
    try:
        with torch.no_grad():
            truth = _flat(exact(**{name: _double(x) for name, x in inputs.items()}))
            low = _flat(eager(**inputs))
    except Exception:
        return  # more than transformers takes: a mask as a list of lists, say
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    at_padding = isinstance(mask, Tensor) and isinstance(labels, Tensor) and labels.numel() == mask.numel()
    loss = mask is None or (
        kind != "ForQuestionAnswering"
        and not (at_padding and bool(((mask == 0) & (labels.reshape(mask.shape) >= 0)).any()))
    )
    _compare(what, results, low, truth, mask, dtype, loss=loss)


def _compare(
    what: str,
    results: dict[str, Tensor],
    low: dict[str, Tensor],
    truth: dict[str, Tensor],
    mask: Any,
    dtype: torch.dtype,
    *,
    loss: bool,
) -> None:
    """Every output that both have, at the real tokens.

    By design padding has no part in a loss (which is compared if it makes no difference) or in the softmax of an
    answer, and no hidden state: where the first token is padding, what is pooled from it is not compared.
    """
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 3) and _binary(mask))
    if not plain:
        return
    for name in sorted(results.keys() & truth.keys()):
        ours, eager, exact = results[name], low[name], truth[name]
        pooled = name == "loss" or exact.dim() < 2 or mask is None or exact.shape[:2] != mask.flatten(0, -2).shape
        of_nothing = (
            name == "loss" and bool(exact.isnan()) and bool(ours.isfinite())
        )  # by design the mean of nothing is 0
        if (
            (name == "loss" and not loss)
            or of_nothing
            or (pooled and mask is not None and bool((mask[..., 0] == 0).any()))
        ):
            continue
        if mask is not None and exact.dim() >= 2 and exact.shape[:2] == mask.flatten(0, -2).shape:
            real = mask.flatten(0, -2) != 0
            if ours.shape != exact.shape:
                raise Broken(f"{what}: {name} has shape {tuple(ours.shape)}; transformers' {tuple(exact.shape)}")
            ours, eager, exact = ours[real], eager[real], exact[real]
        if fault := wrong(ours, eager, exact, dtype):
            raise Broken(f"{what}: {name}: {fault}")


def _binary(mask: Tensor) -> bool:
    """Whether it is a mask of ones and zeros with a real token in every row: transformers' softmax needs one."""
    return bool(((mask == 0) | (mask == 1)).all()) and bool((mask != 0).any(-1).all())


def _flat(out: Any) -> dict[str, Tensor]:
    flat = {}
    for name, value in out.items():
        if name in ("mlm_loss", "nsp_loss", "mlm_count", "mlm_correct"):
            continue
        for index, x in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(x, Tensor):
                flat[f"{name} {index}" if isinstance(value, tuple) else name] = x.detach()
    return flat


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


_PIECES = (
    "a small bird", "the old house .", "", " ", "\n", "\t\0", "\ud800", "\udfff x", "é", "e\u0301", "\u200b", "\u202e",
    "北京", "\U0001f642", "\U0001f469\u200d\U0001f467", "[CLS]", "[MASK] [SEP]", "##s", "x" * 200_000, "x " * 5_000,
    "\x1b[31m", "<script>", "\ufeff", "\u2028", "\x85", "\u0130", "\ufb01", "\U0010ffff", "A" * 101, "'; DROP", "=1+1",
    "%s%n", "../..",
)  # fmt: skip
_NO_TEXTS: tuple[Any, ...] = (
    None, float("nan"), 3, b"bytes", ["a", "b"], ("a", "b"), {"text": "a"}, True, [], float("inf"), object(),
)  # fmt: skip


@functools.cache
def _encoder(folder: Path) -> tuple[Any, Any, Any, Any, Any]:
    import tokenizers
    import transformers

    import bert_fast
    from bert_fast.data import load_tokenizer

    ours = bert_fast.BertModel.from_pretrained(folder).eval()
    eager, exact = (
        transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval() for _ in range(2)
    )
    theirs = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    return ours, load_tokenizer(str(folder)), eager, exact.double(), theirs


def encode(case: Case, _: Any) -> None:
    """Up to five texts of pieces that are no usual words, or no texts at all."""
    rng = case.rng
    ours, tokenizer, eager, exact, theirs = _encoder(case.material / "base")
    texts: Any = [
        rng.choice(["", " "]).join(rng.choices(_PIECES, k=rng.randint(0, 3))) for _ in range(rng.randint(0, 5))
    ]
    options: dict[str, Any] = {}
    if rng.random() < 0.3 and texts:
        texts[rng.randrange(len(texts))] = rng.choice(_NO_TEXTS)
    if rng.random() < 0.1:
        texts = rng.choice([*_NO_TEXTS, (x for x in ["a"]), {"a", "b"}, "one text"])
    if rng.random() < 0.3:
        options["batch_tokens"] = rng.choice([1, 2, 7, 100, 0, -1, 2**40, "x", None, 1.5])
    if rng.random() < 0.2:
        options["max_seqlen"] = rng.choice([2, 3, 40, 41, 1, 0, -1, 2**40, "x"])
    if rng.random() < 0.2:
        options["pooling"] = rng.choice(["cls", "max", "mean", "x", None, 3])
    shown = repr(texts)
    case.note(f"encode({shown[:300]}{'...' if len(shown) > 300 else ''}, {options})")
    try:
        vectors = ours.encode(texts, tokenizer=tokenizer, **options)
    except Exception as error:
        require_clear(error, "encode")
        if isinstance(texts, list) and all(isinstance(x, str) and _is_text(x) for x in texts) and not options:
            raise Broken(f"encode refuses valid texts: {error}") from error
        return
    if isinstance(texts, str):
        texts = [texts]
    elif isinstance(texts, Iterator):
        texts = ["a"]  # what it gave
    if not isinstance(texts, (list, tuple)) or not all(map(_is_text_or_pair, texts)):
        raise Broken(f"encode takes {shown[:100]} and returns {tuple(vectors.shape)}")
    if options.get("pooling", "mean") != "mean":
        return
    longest = options.get("max_seqlen") or exact.config.max_position_embeddings
    for index, text in enumerate(texts):
        encoding = theirs.encode(text) if isinstance(text, str) else theirs.encode(*text)
        ids, kinds = encoding.ids, encoding.type_ids
        if len(ids) > longest:
            ids, kinds = [*ids[: longest - 1], ids[-1]], [*kinds[: longest - 1], kinds[-1]]
        inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([kinds])}
        with torch.no_grad():
            truth, low = (model(**inputs).last_hidden_state[0].mean(0) for model in (exact, eager))
        if fault := wrong(vectors[index] if vectors.dim() == 2 else vectors, low, truth):
            raise Broken(f"encode, text {index} {text[:60]!r}: {fault}")


def _is_text_or_pair(x: Any) -> bool:
    texts = [x] if isinstance(x, str) else x
    return (
        isinstance(texts, (list, tuple))
        and len(texts) in (1, 2)
        and all(isinstance(t, str) and _is_text(t) for t in texts)
    )


def _is_text(text: str) -> bool:
    """Whether it is Unicode: without a lone surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


ATTACKS = [
    Attack("models", "inputs of every head", heads, share=3, quick=150, timeout=60),
    Attack("models", "encode", encode, share=1, quick=30, timeout=60),
]
