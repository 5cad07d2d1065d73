"""What dispatch can launch: every Triton operator, called at the sizes, dtypes and options that people use.

Each function calls the operators of one op with tensors of the meta device; `compile_report` records the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 8192 + 7  # T is no multiple of anything
WIDTHS = (128, 256, 384, 512, 768, 1024)  # E of the BERT family, tiny to large


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def bias_gelu() -> None:
    from bert_fast.kernels.bias_gelu import triton as ops

    for dtype, tanh in product(DTYPES, (False, True)):
        x, bias = empty(TOKENS, 3072, dtype=dtype), empty(3072)
        ops.bias_gelu_fwd(x, bias, tanh)
        ops.bias_gelu_bwd(x, x, bias, tanh)


def add_layer_norm() -> None:
    """Each width in bf16, every dtype and option at 768, the widest tiles in bf16 and fp32."""
    from bert_fast.kernels.add_layer_norm import triton as ops

    state, statistics = empty(2, dtype=torch.int64), empty(TOKENS)

    def both(E: int, dtype: torch.dtype, parameters: torch.dtype, dropout_p: float, has_x_bias: bool = True) -> None:
        x, weight = empty(TOKENS, E, dtype=dtype), empty(E, dtype=parameters)
        x_bias = weight if has_x_bias else None
        ops.add_layer_norm_fwd(x, x, weight, weight, x_bias, dropout_p, 1e-12, state)
        ops.add_layer_norm_bwd(x, x, x, weight, x_bias, statistics, statistics, dropout_p, state)

    for E, dropout_p in product(WIDTHS, (0.0, 0.1)):
        both(E, torch.bfloat16, torch.float32, dropout_p)
    for dtype in DTYPES:
        both(768, dtype, dtype, 0.1)
    both(768, torch.bfloat16, torch.float32, 0.1, has_x_bias=False)
    for E, dtype in product((2048, 4096, 8192), (torch.float32, torch.bfloat16)):
        both(E, dtype, torch.float32, 0.1)


def embedding_layer_norm() -> None:
    """fp32 tables under autocast at the widths of four tiles, all dtypes and options at 768, the widest tiles."""
    from bert_fast.kernels.embedding_layer_norm.triton import operators as ops

    state, statistics = empty(2, dtype=torch.int64), empty(TOKENS)

    def both(E: int, table: torch.dtype, out: torch.dtype, dropout_p: float = 0.1, words: int = 30522) -> None:
        # Up to 32767 rows of all tables the tokens are sorted by keys of 16 bits.
        ids = [empty(TOKENS, dtype=torch.int64 if words < 2**15 else torch.int32)] * 3
        tables = [empty(rows, E, dtype=table) for rows in (words, 2, 512)]
        weight, dout = empty(E), empty(TOKENS, E, dtype=out)
        ops.embedding_layer_norm_fwd(*ids, *tables, weight, weight, dropout_p, 1e-12, 0, state, out)
        ops.embedding_layer_norm_bwd(dout, *ids, *tables, weight, statistics, statistics, dropout_p, 0, state)

    for E in (128, 384, 768, 1024):
        both(E, torch.float32, torch.bfloat16)
    for dtype in DTYPES:
        both(768, dtype, dtype)
    both(768, torch.float32, torch.bfloat16, 0.0, words=119547)
    for E in (4096, 8192):
        both(E, torch.float32, torch.float32)


def attention() -> None:
    """Every regime and packing at D of BERT (64, MiniLM and others: 32), the others with the dropout of training."""
    from bert_fast.kernels.attention.triton import operators as ops

    N = 12
    cu_seqlens, rng_state = empty(65, dtype=torch.int32), empty(2, dtype=torch.int64)

    def both(dtype: torch.dtype, D: int, max_seqlen: int, dropout_p: float) -> None:
        qkv, bias, out = empty(TOKENS, 3, N, D, dtype=dtype), empty(3, N, D), empty(TOKENS, N, D, dtype=dtype)
        rest = (cu_seqlens, max_seqlen, 0.125, dropout_p, rng_state)
        ops.attention_fwd(qkv, bias, *rest)
        ops.attention_bwd(out, qkv, bias, out, empty(N, TOKENS), *rest)

    sizes = [(64, 16), (64, 32), (64, 64), (64, 128), (64, 512), (32, 128), (32, 512)]
    for (D, max_seqlen), dropout_p in product(sizes, (0.0, 0.1)):
        both(torch.bfloat16, D, max_seqlen, dropout_p)
    for D, max_seqlen in ((128, 64), (128, 512), (256, 512), (40, 512)):
        both(torch.bfloat16, D, max_seqlen, 0.1)
    for max_seqlen in (128, 512):
        both(torch.float16, 64, max_seqlen, 0.1)
    both(torch.float32, 64, 512, 0.0)
    for D in (32, 64, 128, 256):  # one regime for all lengths
        both(torch.float32, D, 512, 0.1)


def padding() -> None:
    from bert_fast.kernels.padding import triton as ops

    for seqlen in (128, 199, 512, 8192):
        mask = empty(32, seqlen, dtype=torch.bool)
        ends, block = ops.count_tokens(mask)
        ops.write_indices(mask, ends, TOKENS, block)  # unpad_indices without reading T
    # Rows of ids (8 bytes), of hidden states, and of 6 and 3 bytes: every width of the integers that are moved.
    rows = [(torch.int64, ()), (torch.float16, (3,)), (torch.int8, (3,))]
    rows += [(dtype, (E,)) for dtype in (torch.float32, torch.bfloat16) for E in WIDTHS] + [(torch.float32, (33,))]
    for dtype, shape in rows:
        x, indices = empty(TOKENS, *shape, dtype=dtype), empty(TOKENS, dtype=torch.int64)
        ops.gather_rows(x, indices)
        ops.scatter_rows(x, indices, 2 * TOKENS)


def lamb() -> None:
    from bert_fast.kernels.lamb.triton import operators as ops

    # The elements of a tensor and the number of tensors are read by the kernels: any sizes do.
    scale, step = empty(), empty()
    for param, grad in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), *((d, d) for d in DTYPES[1:])):
        for offset in (0, 1):  # at the start of its memory, and one element into it: no multiple of 16 bytes
            lists = [
                [empty(30522 + offset, dtype=dtype)[offset:] for _ in range(3)]
                for dtype in (param, grad, torch.float32, torch.float32)
            ]
            ops.clip_scale(lists[1], 1.0)
            ops.lamb_step(*lists, step, scale, (0.9, 0.999), 1e-6, 0.01, scale)  # in a CUDA graph
            ops.lamb_step(*lists, 7, 0.01, (0.9, 0.999), 1e-6, 0.01, scale)  # clipped
            ops.lamb_step(*lists, 7, 0.01, (0.9, 0.999), 1e-6, 0.01, 1.0)


def masked_lm_loss() -> None:
    """Each width in bf16, every dtype at 768; the products' tiles are the same at every width."""
    from bert_fast.kernels.masked_lm_loss.triton import operators as ops

    tokens, vocabulary = 4 * TOKENS, 30522  # several chunks in every dtype
    labels, settings = empty(tokens, dtype=torch.int64), (1e-12, -100, 0.1, 1e-4)
    for E, dtype in dict.fromkeys([*product(WIDTHS, (torch.bfloat16,)), *product((768,), DTYPES)]):
        shapes = ((E, E), (E,), (E,), (E,), (vocabulary, E), (vocabulary,))
        tensors = empty(tokens, E, dtype=dtype), labels, *(empty(*shape) for shape in shapes)
        ops.masked_lm_loss_fwd(*tensors, *settings, False)
        *_, gradients = ops.masked_lm_loss_fwd(*tensors, *settings, True)
        ops.masked_lm_loss_bwd(empty(), gradients)


CASES: dict[str, Callable[[], Any]] = {
    "add_layer_norm": add_layer_norm,
    "attention": attention,
    "bias_gelu": bias_gelu,
    "embedding_layer_norm": embedding_layer_norm,
    "lamb": lamb,
    "masked_lm_loss": masked_lm_loss,
    "padding": padding,
}
