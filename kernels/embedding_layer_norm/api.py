"""Public function of embedding_layer_norm: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import (
    check_eps,
    check_floating,
    check_int,
    check_integer,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
    compute_dtype,
)
from bert_fast.kernels._common.philox import dropout_state
from bert_fast.kernels.embedding_layer_norm.op import OP


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    rng_state: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """BERT's embeddings: out = dropout(LayerNorm(word[id] + position[position id] + token_type[type id])).

    LayerNorm(s) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over each row, with the biased variance. The
    gradients of the tables are summed in float32 in an order that depends on the ids alone.

    Args:
        input_ids, token_type_ids, position_ids: int64 or int32 (T,), rows of `word`, `token_type` and `position`.
        word: (V, E) float32, bfloat16, float16 or float64.
        token_type: (K, E) in the dtype of `word`, a row for each segment type.
        position: (P, E) in the dtype of `word`.
        weight, bias: (E,), the dtype of `word` or float32.
        dropout_p: probability of dropping an element of the result, in steps of 1/256; 0 for none.
        eps: added to the variance.
        padding_idx: a row of `word` that gets no gradient, as in torch.nn.Embedding, or None.
        rng_state: int64 (2,), seed and offset of the dropout mask (plane 0, row t, column e); drawn from torch's
            generator where None.
        impl: "auto", "reference", "triton" or "cpu".

    Returns:
        (T, E) in the dtype of `word`, under autocast in autocast's; the tables are read as they are.

    Raises:
        TypeError: ids are not integers, a table or parameter is not floating point, the tables differ in dtype.
        ValueError: a shape, a device, `dropout_p`, `eps`, `padding_idx` or `impl` is none of these, or an id is outside
            its table (on CUDA checked under BERT_FAST_CHECK=1 only).
        ImplUnavailableError: the requested `impl` does not exist or can't run here.

    Source: Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019, section 3.
    """
    tables = {"word": word, "token_type": token_type, "position": position}
    for name, table in tables.items():
        check_floating(name, table, ("rows", "E" if name == "word" else word.shape[1]))
    check_floating("weight", weight, word.shape[1:])
    check_floating("bias", bias, word.shape[1:])
    ids = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
    for (name, index), (of, table) in zip(ids.items(), tables.items(), strict=True):
        check_integer(name, index)
        check_shape(name, index, ("T",) if name == "input_ids" else (input_ids.shape[0],))
        check_range(name, index, table.shape[0], f"{of} has {table.shape[0]} rows")
    check_same_device(input_ids, **ids, **tables, weight=weight, bias=bias)
    check_same_dtype(word, token_type=token_type, position=position)
    if padding_idx is not None:
        last = word.shape[0] - 1
        check_int("padding_idx", padding_idx, 0, last, f"None or a row of word, 0 to {last}")
    eps = check_eps(eps)
    rng_state = dropout_state(dropout_p, rng_state, word)

    # A float32 table is rounded once, on the way out; others keep their dtype in the kernel.
    dtype = compute_dtype(word)
    out_dtype = dtype if word.dtype == torch.float32 else word.dtype
    out: Tensor = OP.select(impl, word, out_dtype)(
        input_ids,
        token_type_ids,
        position_ids,
        word,
        token_type,
        position,
        weight,
        bias,
        dropout_p,
        eps,
        padding_idx,
        rng_state,
        out_dtype,
    )
    return out.to(dtype)
