"""A model folder as the routes use it: what it computes, how its texts become tokens, and its batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bert_fast._device import autocast
from bert_fast._io import read_json
from bert_fast.models.config import BertConfig, longest_input
from bert_fast.models.embedding import embed_ids, embedding_width, pack
from bert_fast.models.files import Source
from bert_fast.models.sentence import MODULES_NAME, SentenceModules, kind_of, transformer_source
from bert_fast.models.sparse import sparse_ids
from bert_fast.models.texts import Truncation
from bert_fast.serve.errors import InvalidInputError, UnknownModelError

Compute = Callable[[Sequence["Tokens"]], list[Any]]
# What a model does, by the class that its config.json names; "embedding" for every other.
KINDS = {
    "ForSequenceClassification": "classifier",  # "reranker" with one label
    "ForTokenClassification": "token-classifier",
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "masked-lm",
}
# By the class of sentence-transformers whose modules.json a folder has.
_OF_MODULES = {"SentenceTransformer": "embedding", "CrossEncoder": "classifier", "SparseEncoder": "masked-lm"}
_CLASSES = {
    "embedding": "BertModel",
    "classifier": "BertForSequenceClassification",
    "reranker": "BertForSequenceClassification",
    "token-classifier": "BertForTokenClassification",
    "masked-lm": "BertForMaskedLM",
}
_KEPT = {"right": "head", "left": "tail"}  # what is kept of a text, by the side that is cut


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text or a pair.

    Attributes:
        ids, types: token ids and token types.
        characters: the length of the text.
        prompt_length: the number of tokens at the start that are not pooled.
    """

    ids: list[int]
    types: list[int] | None = None
    characters: int = 0
    prompt_length: int = 0


@dataclass(eq=False)
class ServedModel:
    """A loaded model.

    Attributes:
        name: in requests and answers.
        kind: embedding, classifier, reranker, token-classifier or masked-lm.
        model, tokenizer: in eval mode; the tokenizer is copied for each thread.
        modules: how texts become tokens, and tokens vectors, as the folder says.
        precision: fp32, bf16 or int8.
        auto_truncate: whether longer texts are cut where a request doesn't say.
    """

    name: str
    kind: str
    model: Any
    tokenizer: Any
    modules: SentenceModules
    precision: str = "fp32"
    auto_truncate: bool = True
    _local: threading.local = field(default_factory=threading.local)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of a text, special tokens included."""
        return self.modules.max_seqlen or longest_input(self.model.config)

    @property
    def labels(self) -> list[str]:
        """The labels of a classifier, by class."""
        config = self.model.config
        return [str(config.id2label[index]) for index in range(config.num_labels)]

    @property
    def dtype(self) -> str:
        """The name of what the matrix products are computed in, as TEI's /info says it."""
        return {"fp32": "float32", "bf16": "bfloat16"}.get(self.precision, self.precision)

    @property
    def width(self) -> int:
        """The number of components of a vector of an embedding model."""
        return embedding_width(self.model, self.modules)

    def need(self, *kinds: str) -> None:
        """UnknownModelError unless the model is of one of these kinds."""
        if self.kind not in kinds:
            raise UnknownModelError(
                f"the model {self.name} is of kind {self.kind}; this route needs {' or '.join(kinds)}"
            )

    def prompt(self, name: str | None) -> str:
        """The text of the prompt of this name, or of the default one; InvalidInputError where there is none."""
        try:
            return self.modules.prompt_of(None, name)
        except ValueError as error:
            raise InvalidInputError(str(error)) from None

    # Tokenization, in threads

    def thread_tokenizer(self) -> Any:
        """A copy of the tokenizer that belongs to this thread: truncation is a state of a tokenizer."""
        copy = getattr(self._local, "tokenizer", None)
        if copy is None:
            copy = self._local.tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
            copy.no_padding()
            copy.no_truncation()
        return copy

    def tokenize(
        self,
        texts: Sequence[str | list[int]],
        *,
        prompt: str = "",
        truncate: bool | None = None,
        side: str | None = None,
    ) -> list[Tokens]:
        """The tokens of texts, or of ids as /tokenize returns them, with or without the special tokens around them.

        Args:
            truncate: cut what is longer than `max_length`; None for `auto_truncate`.
            side: the side that is cut, right or left in any case; None for that of the model's folder.

        Raises:
            InvalidInputError: a text is too long and not cut, or an id is none of the model's.
        """
        tokenizer = self.thread_tokenizer()
        strings = [prompt + text for text in texts if isinstance(text, str)]
        encodings = iter(tokenizer.encode_batch_fast(strings))
        rows = [next(encodings).ids if isinstance(text, str) else self._wrap(tokenizer, text) for text in texts]
        keep = self.modules.keep if side is None else _KEPT[side.lower()]
        cut = Truncation.of(tokenizer, self.max_length, keep)
        left_out = 0 if self.modules.include_prompt or not prompt else cut.prompt_length(tokenizer, prompt)
        tokens = [
            Tokens(cut(ids), None, len(text), left_out if isinstance(text, str) else 0)  # ids have no prompt
            for ids, text in zip(rows, texts, strict=True)
        ]
        for index, ids in enumerate(rows):
            self._check_length(index, len(ids), truncate)
            if len(ids) <= tokens[index].prompt_length:
                raise InvalidInputError(f"the text {index} has no tokens beside those of the prompt")
        return tokens

    def tokenize_pairs(
        self, pairs: Sequence[tuple[str, str]], *, truncate: bool | None = None, side: str | None = None
    ) -> list[Tokens]:
        """The tokens of pairs of texts; the longer text of a pair is cut first."""
        tokenizer = self.thread_tokenizer()
        if not (self.auto_truncate if truncate is None else truncate):
            for index, encoding in enumerate(tokenizer.encode_batch_fast(list(pairs))):
                self._check_length(index, len(encoding.ids), truncate)
        tokenizer.enable_truncation(self.max_length, strategy="longest_first", direction=(side or "right").lower())
        try:
            encodings = tokenizer.encode_batch(list(pairs))
        finally:
            tokenizer.no_truncation()
        return [
            Tokens(encoding.ids, encoding.type_ids, len(first) + len(second))
            for encoding, (first, second) in zip(encodings, pairs, strict=True)
        ]

    def _check_length(self, index: int, length: int, truncate: bool | None) -> None:
        if length > self.max_length and not (self.auto_truncate if truncate is None else truncate):
            raise InvalidInputError(
                f"the text {index} has {length} tokens; expected at most {self.max_length} (truncate: true cuts it)"
            )

    def _wrap(self, tokenizer: Any, ids: list[int]) -> list[int]:
        rows = self.model.config.vocab_size
        for value in ids:
            if not 0 <= value < rows:
                raise InvalidInputError(f"the token id {value} is none of the model's; expected 0 to {rows - 1}")
        around, cut = tokenizer.encode("a").ids, Truncation.of(tokenizer, self.max_length)
        head, tail = around[: cut.leading], around[len(around) - cut.trailing :]
        whole = len(ids) >= len(head) + len(tail)
        if whole and ids[: len(head)] == head and ids[len(ids) - len(tail) :] == tail:
            return ids
        return head + ids + tail

    # Computation, in the thread of the queue

    def vectors(self, batch: Sequence[Tokens]) -> list[np.ndarray[Any, Any]]:
        """The vector of each text, (D,) float32, after the folder's last module."""
        modules = self.modules
        vectors = self._in_precision(
            embed_ids,
            [tokens.ids for tokens in batch],
            modules=modules,
            prompt_length=[tokens.prompt_length for tokens in batch],
            batch_tokens=sum(len(tokens.ids) for tokens in batch),
        )
        return list(vectors.numpy())

    @torch.inference_mode()
    def token_vectors(self, batch: Sequence[Tokens]) -> list[np.ndarray[Any, Any]]:
        """The last hidden state of each token: (n, E) float32 for each text."""
        hidden = self._forward(batch).last_hidden_state.float().cpu()
        return [part.numpy() for part in hidden.split([len(tokens.ids) for tokens in batch])]

    @torch.inference_mode()
    def logits(self, batch: Sequence[Tokens]) -> list[np.ndarray[Any, Any]]:
        """The logits of each text, (labels,) float32."""
        return list(self._forward(batch).logits.float().cpu().numpy())

    @torch.inference_mode()
    def token_logits(self, batch: Sequence[Tokens]) -> list[np.ndarray[Any, Any]]:
        """The logits of each token, (n, labels) float32 for each text."""
        logits = self._forward(batch).logits.float().cpu()
        return [part.numpy() for part in logits.split([len(tokens.ids) for tokens in batch])]

    def sparse(self, batch: Sequence[Tokens]) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """SPLADE's sparse vectors: the ids of the components above 0 and their values, for each text."""
        ids, size = [tokens.ids for tokens in batch], sum(len(tokens.ids) for tokens in batch)
        rows = self._in_precision(sparse_ids, ids, modules=self.modules, batch_tokens=size)
        return [(row.indices()[0].numpy(), row.values().numpy()) for row in (one.coalesce() for one in rows)]

    def _in_precision(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        device = next(self.model.parameters()).device
        with autocast(device, "bf16" if self.precision == "bf16" else "fp32"):
            return function(self.model, *arguments, **options)

    def _forward(self, batch: Sequence[Tokens]) -> Any:
        inputs = pack([tokens.ids for tokens in batch], next(self.model.parameters()).device)
        if getattr(self.model.config, "type_vocab_size", 0) < 2:
            del inputs["token_type_ids"]
        elif any(tokens.types is not None for tokens in batch):
            types = [kind for tokens in batch for kind in (tokens.types or [0] * len(tokens.ids))]
            inputs["token_type_ids"] = torch.tensor(types, dtype=torch.int64).to(inputs["input_ids"].device)
        return self._in_precision(lambda model: model(**inputs, return_dict=True))


def load(folder: str, name: str | None = None, *, device: str, precision: str, auto_truncate: bool) -> ServedModel:
    """Load a model folder or a hub repository for serving.

    Args:
        folder: the folder, or the repository's name.
        name: in requests; None for the last part of `folder`.
        device: auto, cpu, cuda ...
        precision: fp32, bf16, int8, or auto: bf16 where the device has units for it, else fp32.

    Raises:
        FileNotFoundError, ValueError: the folder can't be loaded, or its precision isn't supported.
    """
    from bert_fast.cli.models import load as load_model
    from bert_fast.cli.models import model_folder

    local = Path(model_folder(folder))
    kind = _kind_of(Source(local))
    options = {"add_pooling_layer": False} if kind == "embedding" else {}
    model, _ = load_model(_CLASSES[kind], str(local), device, **options)
    if kind == "classifier" and model.config.num_labels == 1:
        kind = "reranker"
    modules = model.modules_of_texts
    modules.check()
    if kind == "masked-lm" and model.sentence_modules is None:
        modules = replace(modules, pooling=("max",))  # SPLADE's, where the folder says nothing
    tokenizer = model.source_tokenizer()
    precision = _set_precision(model, precision)
    return ServedModel(name or local.name, kind, model, tokenizer, modules, precision, auto_truncate)


def _kind_of(source: Source) -> str:
    """What modules.json says, where there is one: an encoder's config.json may still name the class of pretraining."""
    path = transformer_source(source).find("config.json")
    config = {} if path is None else read_json(path)
    if source.find(MODULES_NAME) is not None:
        found = kind_of(source, BertConfig())
        if found in _OF_MODULES:
            return _OF_MODULES[found]
    names = config.get("architectures") or [""]
    return next((kind for ending, kind in KINDS.items() if str(names[0]).endswith(ending)), "embedding")


def _set_precision(model: nn.Module, precision: str) -> str:
    from bert_fast.integrations.freeze import freeze
    from bert_fast.integrations.quantize import quantize
    from bert_fast.kernels._common.extensions import has_bf16_isa

    on_cpu = next(model.parameters()).device.type == "cpu"
    if precision == "auto":
        precision = "bf16" if not on_cpu or has_bf16_isa() else "fp32"
    if precision == "int8":
        if not on_cpu:
            raise ValueError("precision is int8 and the device is no CPU; expected fp32 or bf16")
        quantize(model)
    elif on_cpu:
        freeze(model)
    return precision
