"""bge-m3: dense, sparse and multi-vector outputs of one pass of the encoder.

Source: Chen et al., "BGE M3-Embedding", 2024, section 3.2; the files are those of the model's repository, which
FlagEmbedding reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from bert_fast.models import storage
from bert_fast.models.bert import BertModel
from bert_fast.models.embedding import WINDOW, TextTokens, batches_by_length, pack
from bert_fast.models.files import HUB_OPTIONS, Source
from bert_fast.models.texts import as_iterable, as_tokenizer, check_integer_argument, evaluating, text_windows

OUTPUTS = ("dense", "sparse", "multi_vector")
_SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[UNK]")  # have no weight in a sparse vector


class BgeM3Outputs(TypedDict, total=False):
    """What `BgeM3Model.encode` returns: the outputs that were requested, on the CPU, in the order of the texts."""

    dense: Tensor  # (B, E) float32, of length 1
    sparse: Tensor  # (B, V) float32, sparse COO and coalesced
    multi_vector: list[Tensor]  # B of (n, D) float32, of length 1, n the number of tokens after the first


class BgeM3Model:
    """bge-m3's three outputs, over one encoder.

    Args:
        model: the encoder.
        sparse: (E) -> (1), the weight of a token.
        multi_vector: (E) -> (D), the vector of a token.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one; None for that of the folder
            that `model` was loaded from.
    """

    def __init__(self, model: BertModel, sparse: nn.Linear, multi_vector: nn.Linear, tokenizer: Any = None) -> None:
        self.model, self.sparse, self.multi_vector = model, sparse, multi_vector
        self.tokenizer = as_tokenizer(model.source_tokenizer() if tokenizer is None else tokenizer)
        ids = [self.tokenizer.token_to_id(name) for name in _SPECIAL]
        self._special = torch.tensor([i for i in ids if i is not None], dtype=torch.int64)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, allow_pickle: bool = False, **options: Any) -> BgeM3Model:
        """Load a folder with the encoder, sparse_linear.pt and colbert_linear.pt.

        Args:
            name_or_path: a folder, or the name of a hub repository.
            allow_pickle: True; the two files are pickles (read for their tensors only, no code).
            options: see `BertModel.from_pretrained`.

        Raises:
            FileNotFoundError: there is no such folder, a file is not there, or `allow_pickle` is False.
            ValueError: a file has other tensors than the `weight` and `bias` of a linear layer of the model's width.
        """
        options.setdefault("add_pooling_layer", False)
        source = Source(name_or_path, **{name: options[name] for name in HUB_OPTIONS if name in options})
        if not allow_pickle:
            raise FileNotFoundError(
                f"{source}: sparse_linear.pt and colbert_linear.pt are pickles; pass allow_pickle=True"
            )
        model = BertModel.from_pretrained(name_or_path, allow_pickle=True, **options)
        width = model.config.hidden_size
        sparse, multi_vector = (_linear(source, f"{name}_linear.pt", width) for name in ("sparse", "colbert"))
        if sparse.out_features != 1:
            raise ValueError(f"{source}/sparse_linear.pt has {sparse.out_features} outputs; expected 1")
        return cls(model, sparse, multi_vector)

    def encode(
        self,
        texts: Iterable[str],
        *,
        output: str | Sequence[str] = OUTPUTS,
        prompt: str | None = None,
        max_seqlen: int | None = None,
        batch_tokens: int = 8192,
        batch_size: int | None = None,
    ) -> BgeM3Outputs:
        """Embed texts; the encoder runs once for all outputs.

        With hidden states h_0 (of the first token) to h_n: dense is h_0 / ||h_0||; the weight of vocabulary entry v in
        sparse is the maximum of relu(w h_i + b) over the tokens i that are v, special tokens left out; multi_vector is
        x_i / ||x_i|| with x_i = W h_i + c, i >= 1. Scores are dot products, and `maxsim(..., normalize=True)`.

        Args:
            texts: any number of them: a sequence, an iterator, a Series, an array; a str is refused.
            output: the names in `OUTPUTS` to return, one or several.
            prompt, max_seqlen, batch_tokens, batch_size: see `bert_fast.models.embedding.encode`.

        Returns:
            A dictionary of the outputs, see `BgeM3Outputs`.

        Raises:
            TypeError: a text is no str, by its index; or an argument has another type.
            ValueError: `output` has another name, or a number is out of range.
        """
        names = (output,) if isinstance(output, str) else tuple(output)
        if not names or set(names) - set(OUTPUTS):
            raise ValueError(f"output is {output!r}; expected one or several of {', '.join(OUTPUTS)}")
        check_integer_argument("batch_tokens", batch_tokens, 1)
        if batch_size is not None:
            check_integer_argument("batch_size", batch_size, 1)
        modules = self.model.modules_of_texts
        tokens = TextTokens.of(self.model, self.tokenizer, modules, prompt=prompt, max_seqlen=max_seqlen)
        size = (self.model.config.hidden_size, self.model.config.vocab_size)
        dense, vectors = [torch.empty(0, size[0])], list[Tensor]()
        sparse = [
            torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.int64), [], (0, size[1]), check_invariants=True)
        ]
        with evaluating(self.model), torch.inference_mode():
            for window in text_windows(as_iterable(texts), WINDOW):
                part = self._embed(tokens(window), names, batch_tokens, batch_size)
                dense.append(part["dense"])
                sparse.append(part["sparse"])
                vectors += part["multi_vector"]
        with torch.inference_mode(False):  # ordinary tensors, which take part in training
            found = BgeM3Outputs(
                dense=torch.cat([x.clone() for x in dense]),
                sparse=torch.cat(sparse).coalesce(),
                multi_vector=[x.clone() for x in vectors],
            )
        return {name: found[name] for name in names}  # type: ignore[literal-required, return-value]

    def _embed(
        self, ids: list[list[int]], names: Sequence[str], batch_tokens: int, batch_size: int | None
    ) -> BgeM3Outputs:
        """All outputs of one window; those that are not among `names` are empty."""
        dense = torch.empty(len(ids), self.model.config.hidden_size)
        vectors = [torch.empty(0)] * len(ids)
        coordinates, weights = [torch.empty(2, 0, dtype=torch.int64)], [torch.empty(0)]
        for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens, batch_size):
            batch = [ids[i] for i in indices]
            inputs = pack(batch, self.model.device)
            hidden = self.model(**inputs, return_dict=True).last_hidden_state.float().cpu()
            lengths = torch.tensor([len(sequence) for sequence in batch])
            rows = torch.tensor(indices).repeat_interleave(lengths)
            if "dense" in names:
                dense[torch.tensor(indices)] = nn.functional.normalize(hidden[lengths.cumsum(0) - lengths], dim=-1)
            if "sparse" in names:
                columns = inputs["input_ids"].cpu()
                scored = ~torch.isin(columns, self._special)
                coordinates.append(torch.stack([rows[scored], columns[scored]]))
                weights.append(self.sparse(hidden[scored])[:, 0].relu())
            if "multi_vector" in names:
                projected = nn.functional.normalize(self.multi_vector(hidden), dim=-1)
                for i, x in zip(indices, projected.split(lengths.tolist()), strict=True):
                    vectors[i] = x[1:]
        with torch.inference_mode(False):
            size = (len(ids), self.model.config.vocab_size)
            sparse = _largest(torch.cat(coordinates, 1).clone(), torch.cat(weights).clone(), size)
        return BgeM3Outputs(dense=dense, sparse=sparse, multi_vector=vectors)


def _largest(coordinates: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """The sparse tensor with the largest of the values at each place, those of 0 left out."""
    places, where = (coordinates[0] * size[1] + coordinates[1]).unique(return_inverse=True)
    best = torch.zeros(len(places)).scatter_reduce(0, where, values, "amax")
    places, best = places[best > 0], best[best > 0]
    indices = torch.stack([places // size[1], places % size[1]])
    return torch.sparse_coo_tensor(indices, best, size, check_invariants=True).coalesce()


def _linear(source: Source, name: str, width: int) -> nn.Linear:
    if (path := source.find(name)) is None:
        raise FileNotFoundError(f"{source} has no {name}; expected a folder of bge-m3")
    tensors = storage.read_pickle(path)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if tensors.keys() != {"weight", "bias"} or weight is None or bias is None or weight.shape != (len(bias), width):
        shapes = {key: tuple(x.shape) for key, x in tensors.items()}
        raise ValueError(f"{path} has {shapes}; expected the weight (D, {width}) and the bias (D,) of a linear layer")
    linear = nn.Linear(width, len(bias), device="meta")
    linear.weight, linear.bias = (nn.Parameter(x.float(), requires_grad=False) for x in (weight, bias))
    return linear
