"""From what the user gives to what the encoder takes: checks, and padding removed once, before the embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor

from bert_fast.kernels import pad, unpad
from bert_fast.kernels._common.checks import (
    check_cu_seqlens,
    check_floating,
    check_integer,
    check_range,
    check_same_device,
    check_shape,
    values_are_checked,
)
from bert_fast.threads import settle_after_fork

if TYPE_CHECKING:
    from typing_extensions import Unpack

IGNORE_INDEX = -100
_INTEGERS = (torch.int64, torch.int32)


class Sizes(Protocol):
    """What the checks need to know of a model: `BertConfig` has it."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def input_size(self) -> int:
        """E of inputs_embeds."""

    @property
    def type_vocab_size(self) -> int:
        """Rows of the token type embedding; 0 for none, and then token types are not looked at."""

    @property
    def max_position_embeddings(self) -> int:
        """Rows of the position embedding."""

    @property
    def first_position(self) -> int:
        """The row for the first token of a sequence: 0, or 1 + the padding token's id, as in RoBERTa.

        In the second case rows count the tokens that are not the padding token; the padding token itself has the row
        of its id.
        """


class Inputs(TypedDict, total=False):
    """The tensors that describe a batch, as every model's forward takes them.

    Padded: input_ids (B, S) and attention_mask (B, S), 1 for real tokens, 0 for padding, anywhere in a row; without a
    mask every token is real. token_type_ids default to zeros, position_ids to the column (padding included) or, where
    `Sizes.first_position` is not 0, to that and the number of tokens before that are not the padding token, as in
    transformers; both (B, S) or (1, S). inputs_embeds (B, S, E) stand in for input_ids.

    Packed: input_ids (T,), token_type_ids (T,), position_ids (T,) (default: counted anew in every sequence), cu_seqlens
    int32 (B+1,) and max_seqlen; no attention_mask. inputs_embeds (T, E) stand in for input_ids.
    """

    input_ids: Tensor | None
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    inputs_embeds: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None


@dataclass(frozen=True)
class Tokens:
    """The real tokens of a batch, one after the other, and the way back to the padded shape.

    Attributes:
        input_ids: int64 (T,), or None where inputs_embeds (T, E) stand in.
        token_type_ids, position_ids: int64 (T,).
        cu_seqlens: int32 (B+1,), where each sequence starts; the last is T.
        max_seqlen: at least the length of the longest sequence.
        shape: (B, S) of padded input, None for packed input.
        indices: int64 (T,), places in the flattened (B * S); None where there is no padding to put back.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    shape: tuple[int, int] | None
    indices: Tensor | None

    @classmethod
    def of(cls, sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
        """Check `inputs` and take their real tokens. Raises ValueError or TypeError as the checks name.

        Every forward of ours begins here.
        """
        if not torch.compiler.is_compiling():
            settle_after_fork()
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        packed = inputs.get("cu_seqlens") is not None
        tokens = _packed(sizes, **inputs) if packed else _padded(sizes, **inputs)
        if tokens.input_ids is not None:
            check_range("input_ids", tokens.input_ids, sizes.vocab_size, "vocab_size")
        if sizes.type_vocab_size:
            check_range("token_type_ids", tokens.token_type_ids, sizes.type_vocab_size, "type_vocab_size")
        check_range("position_ids", tokens.position_ids, sizes.max_position_embeddings, "max_position_embeddings")
        return tokens

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    def arguments(self) -> dict[str, Any]:
        """The keywords that give these tokens to a model as packed input."""
        return {
            "input_ids": self.input_ids,
            "inputs_embeds": self.inputs_embeds,
            "token_type_ids": self.token_type_ids,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }

    def restore(self, x: Tensor) -> Tensor:
        """(T, ...) in the shape of the input: (B, S, ...) with zeros at padding; `x` itself for packed input."""
        if self.shape is None:
            return x
        if self.indices is None:
            return x.view(*self.shape, *x.shape[1:])
        return pad(x, self.indices, *self.shape)

    def restore_attentions(self, probabilities: Tensor) -> Tensor:
        """(B, N, max_seqlen, max_seqlen) in the columns of the padded input: (B, N, S, S), zeros at padding."""
        if self.shape is None or self.indices is None:
            return probabilities
        B, S = self.shape
        out = probabilities.new_zeros(B, probabilities.shape[1], S, S)
        for b, columns in enumerate((self.indices % max(S, 1)).split(self.cu_seqlens.diff().tolist())):
            n = columns.shape[0]
            out[b, :, columns.unsqueeze(1), columns] = probabilities[b, :, :n, :n]
        return out

    def places(self) -> Tensor:
        """Where each token sits in a table of a row for every sequence, flattened: int64 (T,).

        The table is (B, S) for padded input, (B, max_seqlen) for packed input.
        """
        T = self.token_type_ids.shape[0]
        if self.indices is not None:
            return self.indices
        tokens = torch.arange(T, device=self.cu_seqlens.device)
        if self.shape is not None:
            return tokens
        return tokens + torch.repeat_interleave(
            torch.arange(self.batch, device=tokens.device) * self.max_seqlen - self.cu_seqlens[:-1].long(),
            self.cu_seqlens.diff().long(),
            output_size=T,
        )

    def scatter(self, x: Tensor, places: Tensor, fill: float) -> Tensor:
        """(T,) in that table, `fill` where there is no token."""
        B, width = self.shape or (self.batch, self.max_seqlen)
        return x.new_full((B * width,), fill).index_copy(0, places, x).view(B, width)

    def select(self, name: str, x: Tensor) -> Tensor:
        """The values of `x`, in the shape of the input's ids, at the real tokens: (T,)."""
        if self.shape is None:
            check_shape(name, x, (self.token_type_ids.shape[0],))
            return x
        check_shape(name, x, self.shape)
        flat = x.reshape(-1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def select_labels(self, name: str, labels: Tensor, classes: int) -> Tensor:
        """Class labels at the real tokens: int64 (T,). Those of padding tokens, which have no logits, are left out."""
        check_integer(name, labels, _INTEGERS)
        check_same_device(self.cu_seqlens, **{name: labels})
        chosen = self.select(name, labels).long()
        check_labels(name, chosen, classes)
        return chosen

    def first(self, x: Tensor) -> Tensor:
        """The row of each sequence's first token, [CLS]: (T, E) -> (B, E), zeros for an empty sequence."""
        if not torch.compiler.is_compiling() and not x.shape[0]:
            return x.new_zeros(self.batch, *x.shape[1:])
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        rows = x.index_select(0, starts.clamp(max=x.shape[0] - 1))
        return rows.masked_fill((starts == ends).unsqueeze(1), 0.0)


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """ValueError unless every label is in [0, classes) or is the ignored -100."""
    if values_are_checked(labels) and labels.numel():
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            raise ValueError(
                f"{name} has the value {int(labels[wrong][0])}; expected 0 to {classes - 1}, or {IGNORE_INDEX}, ignored"
            )


def _ids(name: str, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`x` as int64 in `shape`; (1, S) stands for every row, as in transformers."""
    if x is None:
        return None
    check_integer(name, x, _INTEGERS)
    check_same_device(like, **{name: x})
    if x.dim() == 2 and x.shape[0] == 1 and len(shape) == 2:
        x = x.expand(shape[0], -1)
    check_shape(name, x, shape)
    return x.long()


def _types(sizes: Sizes, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` as int64 in `shape`; zeros where there is none, or no embedding of token types."""
    found = _ids("token_type_ids", x, like, shape) if sizes.type_vocab_size else None
    return torch.zeros(shape, dtype=torch.int64, device=like.device) if found is None else found


def _given(sizes: Sizes, names: tuple[str, ...], **inputs: Unpack[Inputs]) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor that carries the tokens, checked, and the shape of their ids; `names` are that shape's letters."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None:
        check_integer("input_ids", ids, _INTEGERS)
        check_shape("input_ids", ids, names)
        return ids, tuple(ids.shape)
    assert embeds is not None
    check_floating("inputs_embeds", embeds, (*names, sizes.input_size))
    return embeds, tuple(embeds.shape[:-1])


def _packed(sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
    given, shape = _given(sizes, ("T",), **inputs)
    cu_seqlens, max_seqlen = inputs["cu_seqlens"], inputs.get("max_seqlen")
    assert cu_seqlens is not None
    if max_seqlen is None:
        raise ValueError("cu_seqlens came without max_seqlen; expected the length of the longest sequence beside it")
    if inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask came with cu_seqlens; packed input has no padding, so leave the mask out")
    check_same_device(given, cu_seqlens=cu_seqlens)
    check_cu_seqlens(cu_seqlens, shape[0], max_seqlen)
    input_ids = _ids("input_ids", inputs.get("input_ids"), given, shape)
    position_ids = _ids("position_ids", inputs.get("position_ids"), given, shape)
    if position_ids is None:
        _check_length(sizes, max_seqlen)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        if sizes.first_position and input_ids is not None:
            counted = (input_ids != sizes.first_position - 1).long()
            before = torch.cat([counted.new_zeros(1), counted.cumsum(0)])
            starts = before[starts.clamp(0, shape[0])]
            places = (before[1:] - torch.repeat_interleave(starts, lengths, output_size=shape[0])) * counted - 1
        else:
            first = torch.repeat_interleave(starts, lengths, output_size=shape[0])
            places = torch.arange(shape[0], device=given.device) - first
        position_ids = places + sizes.first_position
    token_type_ids = _types(sizes, inputs.get("token_type_ids"), given, shape)
    return Tokens(
        input_ids, inputs.get("inputs_embeds"), token_type_ids, position_ids, cu_seqlens, max_seqlen, None, None
    )


def _padded(sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
    if inputs.get("max_seqlen") is not None:
        raise ValueError("max_seqlen came without cu_seqlens; expected both, for packed input, or neither")
    given, shape = _given(sizes, ("B", "S"), **inputs)
    B, S = shape
    input_ids = _ids("input_ids", inputs.get("input_ids"), given, shape)
    token_type_ids = _types(sizes, inputs.get("token_type_ids"), given, shape)
    position_ids = _ids("position_ids", inputs.get("position_ids"), given, shape)
    by_token = bool(sizes.first_position) and position_ids is None and input_ids is not None
    if not by_token:  # else the columns of padding need no row of their own
        _check_length(sizes, S)
    cu_seqlens, max_seqlen, indices = _sequences(given, inputs.get("attention_mask"), (B, S))
    if by_token:
        assert input_ids is not None
        _check_length(sizes, max_seqlen)
        counted = (input_ids != sizes.first_position - 1).long()
        position_ids = counted.cumsum(1) * counted + sizes.first_position - 1
    elif position_ids is None:
        position_ids = (torch.arange(S, device=given.device) + sizes.first_position).expand(B, S)
    embeds = inputs.get("inputs_embeds")
    return Tokens(
        None if input_ids is None else _gather(input_ids, indices),
        None if embeds is None else _gather(embeds, indices),
        _gather(token_type_ids, indices),
        _gather(position_ids, indices),
        cu_seqlens,
        max_seqlen,
        (B, S),
        indices,
    )


def _sequences(given: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, int, Tensor | None]:
    """cu_seqlens, max_seqlen and the places of the real tokens, None where all are real."""
    B, S = shape
    if mask is None:
        return torch.arange(B + 1, dtype=torch.int32, device=given.device) * S, S, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is {type(mask).__name__}; expected a torch.Tensor")
    check_same_device(given, attention_mask=mask)
    check_shape("attention_mask", mask, shape)
    places = torch.arange(B * S, device=given.device).view(B, S)
    indices, _, cu_seqlens, max_seqlen = unpad(places, mask)
    # While tracing, the number of real tokens is not known, and putting back none is putting back.
    full = not torch.compiler.is_compiling() and indices.shape[0] == B * S
    return cu_seqlens, max_seqlen, None if full else indices


def _gather(x: Tensor, indices: Tensor | None) -> Tensor:
    flat = x.flatten(0, 1)
    return flat if indices is None else flat.index_select(0, indices)


def _check_length(sizes: Sizes, length: int) -> None:
    if length > sizes.max_position_embeddings - sizes.first_position:
        first = f" - {sizes.first_position}" if sizes.first_position else ""
        raise ValueError(
            f"the sequences have {length} tokens; expected at most max_position_embeddings{first} = "
            f"{sizes.max_position_embeddings - sizes.first_position}: truncate them, or split them"
        )
