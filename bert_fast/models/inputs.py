"""Check the inputs of a model and remove padding, once, before the embeddings."""

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
    """The sizes of a model that the checks read; `BertConfig` has them."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def input_size(self) -> int:
        """E of inputs_embeds."""

    @property
    def type_vocab_size(self) -> int:
        """Rows of the token type embedding; 0 for none: token types are then ignored."""

    @property
    def max_position_embeddings(self) -> int:
        """Rows of the position embedding."""

    @property
    def first_position(self) -> int:
        """The row of the position embedding for a sequence's first token: 0, or 1 + the padding token's id in RoBERTa.

        RoBERTa's positions count the tokens other than the padding token, whose own position is its id.
        """


class Inputs(TypedDict, total=False):
    """A batch, as every model's forward takes it. Ids are int64 or int32.

    Padded: input_ids (B, S) and attention_mask (B, S), 1 for real tokens and 0 for padding, anywhere in a row; with no
    mask every token is real. token_type_ids default to zeros. position_ids default to the column, padding included, or,
    where `Sizes.first_position` is not 0, to that plus the number of preceding tokens other than the padding token, as
    in transformers. Both are (B, S) or (1, S). inputs_embeds (B, S, E) replace input_ids.

    Packed: input_ids, token_type_ids and position_ids (T,), cu_seqlens int32 (B+1,) and max_seqlen; no attention_mask.
    position_ids default to the position in the sequence. inputs_embeds (T, E) replace input_ids.
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
    """The real tokens of a batch, packed, and what restores the padded shape.

    Attributes:
        input_ids: int64 (T,), or None where there are inputs_embeds (T, E).
        token_type_ids, position_ids: int64 (T,).
        cu_seqlens: int32 (B+1,), the start of each sequence; the last element is T.
        max_seqlen: at least the length of the longest sequence.
        shape: (B, S) of padded input, None for packed input.
        indices: int64 (T,) into the flattened (B * S); None where there is no padding to restore.
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
    def from_inputs(cls, sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
        """Check the inputs of a forward pass and select their real tokens.

        Raises:
            TypeError: an input has another type or dtype.
            ValueError: a shape, a device or a value is wrong, or inputs contradict each other.
        """
        if not torch.compiler.is_compiling():
            settle_after_fork()
        if (inputs.get("input_ids") is None) == (inputs.get("inputs_embeds") is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        is_packed = inputs.get("cu_seqlens") is not None
        tokens = _from_packed(sizes, **inputs) if is_packed else _from_padded(sizes, **inputs)
        if tokens.input_ids is not None:
            check_range("input_ids", tokens.input_ids, sizes.vocab_size, "vocab_size")
        if sizes.type_vocab_size:
            check_range("token_type_ids", tokens.token_type_ids, sizes.type_vocab_size, "type_vocab_size")
        check_range("position_ids", tokens.position_ids, sizes.max_position_embeddings, "max_position_embeddings")
        return tokens

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self.cu_seqlens.shape[0] - 1

    def as_inputs(self) -> dict[str, Any]:
        """These tokens as packed input: keywords for a model's forward."""
        return {
            "input_ids": self.input_ids,
            "inputs_embeds": self.inputs_embeds,
            "token_type_ids": self.token_type_ids,
            "position_ids": self.position_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
        }

    def restore(self, x: Tensor) -> Tensor:
        """(T, ...) to the shape of the input: (B, S, ...) with zeros at padding; packed input: `x` itself."""
        if self.shape is None:
            return x
        if self.indices is None:
            return x.view(*self.shape, *x.shape[1:])
        return pad(x, self.indices, *self.shape)

    def restore_attentions(self, probabilities: Tensor) -> Tensor:
        """(B, N, max_seqlen, max_seqlen) to the columns of the padded input: (B, N, S, S), zeros at padding."""
        if self.shape is None or self.indices is None:
            return probabilities
        B, S = self.shape
        out = probabilities.new_zeros(B, probabilities.shape[1], S, S)
        for b, columns in enumerate((self.indices % max(S, 1)).split(self.cu_seqlens.diff().tolist())):
            n = columns.shape[0]
            out[b, :, columns.unsqueeze(1), columns] = probabilities[b, :, :n, :n]
        return out

    def table_indices(self) -> Tensor:
        """The index of each token in a flattened table with one row a sequence: int64 (T,).

        The table is (B, S) for padded input, (B, max_seqlen) for packed input.
        """
        T = self.token_type_ids.shape[0]
        if self.indices is not None:
            return self.indices
        tokens = torch.arange(T, device=self.cu_seqlens.device)
        if self.shape is not None:
            return tokens
        return tokens + torch.repeat_interleave(
            torch.arange(self.batch_size, device=tokens.device) * self.max_seqlen - self.cu_seqlens[:-1].long(),
            self.cu_seqlens.diff().long(),
            output_size=T,
        )

    def scatter(self, x: Tensor, table_indices: Tensor, fill: float) -> Tensor:
        """(T,) to that table, `fill` where there is no token."""
        B, width = self.shape or (self.batch_size, self.max_seqlen)
        return x.new_full((B * width,), fill).index_copy(0, table_indices, x).view(B, width)

    def select(self, name: str, x: Tensor) -> Tensor:
        """`x`, in the shape of the input's ids, at the real tokens: (T,). ValueError for another shape."""
        if self.shape is None:
            check_shape(name, x, (self.token_type_ids.shape[0],))
            return x
        check_shape(name, x, self.shape)
        flat = x.reshape(-1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def select_labels(self, name: str, labels: Tensor, classes: int) -> Tensor:
        """Class labels, in the shape of the input's ids, at the real tokens: int64 (T,).

        TypeError or ValueError where dtype, device or shape is wrong, or a label is neither in [0, classes) nor -100.
        """
        check_integer(name, labels, _INTEGERS)
        check_same_device(self.cu_seqlens, **{name: labels})
        selected = self.select(name, labels).long()
        check_labels(name, selected, classes)
        return selected

    def first(self, x: Tensor) -> Tensor:
        """The row of each sequence's first token, [CLS]: (T, E) -> (B, E); zeros for an empty sequence."""
        if not torch.compiler.is_compiling() and not x.shape[0]:
            return x.new_zeros(self.batch_size, *x.shape[1:])
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        rows = x.index_select(0, starts.clamp(max=x.shape[0] - 1))
        return rows.masked_fill((starts == ends).unsqueeze(1), 0.0)


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless every label is in [0, classes) or -100."""
    if values_are_checked(labels) and labels.numel():
        wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            raise ValueError(
                f"{name} has the value {int(labels[wrong][0])}; expected 0 to {classes - 1}, or {IGNORE_INDEX}, ignored"
            )


def _ids(name: str, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`x` as int64 in `shape`; (1, S) is expanded to every row, as in transformers."""
    if x is None:
        return None
    check_integer(name, x, _INTEGERS)
    check_same_device(like, **{name: x})
    if x.dim() == 2 and x.shape[0] == 1 and len(shape) == 2:
        x = x.expand(shape[0], -1)
    check_shape(name, x, shape)
    return x.long()


def _token_types(sizes: Sizes, x: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x` as int64 in `shape`; zeros where it is None, or where the model has no token types."""
    ids = _ids("token_type_ids", x, like, shape) if sizes.type_vocab_size else None
    return torch.zeros(shape, dtype=torch.int64, device=like.device) if ids is None else ids


def _main_input(sizes: Sizes, names: tuple[str, ...], **inputs: Unpack[Inputs]) -> tuple[Tensor, tuple[int, ...]]:
    """input_ids or inputs_embeds, checked, and the shape of the ids; `names` are that shape's letters."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if ids is not None:
        check_integer("input_ids", ids, _INTEGERS)
        check_shape("input_ids", ids, names)
        return ids, tuple(ids.shape)
    assert embeds is not None
    check_floating("inputs_embeds", embeds, (*names, sizes.input_size))
    return embeds, tuple(embeds.shape[:-1])


def _from_packed(sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
    x, shape = _main_input(sizes, ("T",), **inputs)
    cu_seqlens, max_seqlen = inputs["cu_seqlens"], inputs.get("max_seqlen")
    assert cu_seqlens is not None
    if max_seqlen is None:
        raise ValueError("cu_seqlens came without max_seqlen; expected the length of the longest sequence as well")
    if inputs.get("attention_mask") is not None:
        raise ValueError("attention_mask came with cu_seqlens; packed input has no padding: pass no mask")
    check_same_device(x, cu_seqlens=cu_seqlens)
    check_cu_seqlens(cu_seqlens, shape[0], max_seqlen)
    input_ids = _ids("input_ids", inputs.get("input_ids"), x, shape)
    position_ids = _ids("position_ids", inputs.get("position_ids"), x, shape)
    if position_ids is None:
        _check_length(sizes, max_seqlen)
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        if sizes.first_position and input_ids is not None:
            is_counted = (input_ids != sizes.first_position - 1).long()
            counts = torch.cat([is_counted.new_zeros(1), is_counted.cumsum(0)])
            starts = counts[starts.clamp(0, shape[0])]
            positions = (counts[1:] - torch.repeat_interleave(starts, lengths, output_size=shape[0])) * is_counted - 1
        else:
            starts = torch.repeat_interleave(starts, lengths, output_size=shape[0])
            positions = torch.arange(shape[0], device=x.device) - starts
        position_ids = positions + sizes.first_position
    token_type_ids = _token_types(sizes, inputs.get("token_type_ids"), x, shape)
    return Tokens(
        input_ids, inputs.get("inputs_embeds"), token_type_ids, position_ids, cu_seqlens, max_seqlen, None, None
    )


def _from_padded(sizes: Sizes, **inputs: Unpack[Inputs]) -> Tokens:
    if inputs.get("max_seqlen") is not None:
        raise ValueError("max_seqlen came without cu_seqlens; expected both, for packed input, or neither")
    x, shape = _main_input(sizes, ("B", "S"), **inputs)
    B, S = shape
    input_ids = _ids("input_ids", inputs.get("input_ids"), x, shape)
    token_type_ids = _token_types(sizes, inputs.get("token_type_ids"), x, shape)
    position_ids = _ids("position_ids", inputs.get("position_ids"), x, shape)
    counts_tokens = bool(sizes.first_position) and position_ids is None and input_ids is not None
    if not counts_tokens:  # otherwise padding takes no position
        _check_length(sizes, S)
    cu_seqlens, max_seqlen, indices = _sequences(x, inputs.get("attention_mask"), (B, S))
    if counts_tokens:
        assert input_ids is not None
        _check_length(sizes, max_seqlen)
        is_counted = (input_ids != sizes.first_position - 1).long()
        position_ids = is_counted.cumsum(1) * is_counted + sizes.first_position - 1
    elif position_ids is None:
        position_ids = (torch.arange(S, device=x.device) + sizes.first_position).expand(B, S)
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


def _sequences(x: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, int, Tensor | None]:
    """cu_seqlens, max_seqlen and the indices of the real tokens, None where all are real."""
    B, S = shape
    if mask is None:
        return torch.arange(B + 1, dtype=torch.int32, device=x.device) * S, S, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is {type(mask).__name__}; expected a torch.Tensor")
    check_same_device(x, attention_mask=mask)
    check_shape("attention_mask", mask, shape)
    indices, _, cu_seqlens, max_seqlen = unpad(torch.arange(B * S, device=x.device).view(B, S), mask)
    # While tracing, the number of real tokens is unknown, and the indices are kept.
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
            f"{sizes.max_position_embeddings - sizes.first_position}: truncate or split them"
        )
