"""`attn_implementation="bert_fast"` for transformers' models: `register`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bert_fast.integrations.flattened import REGISTERED_NAME, flattened_of, why_not_flattened
from bert_fast.kernels import attention, pad, unpad

# Keywords of an attention function that change the result, and that the kernels don't have.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sliding_window", "cache", "head_mask", "block_table")
_warned: set[str] = set()


def register() -> None:
    """Add the attention implementation "bert_fast" to transformers, for every model with its attention interface.

    Afterwards `from_pretrained(..., attn_implementation="bert_fast")`, or `model.set_attn_implementation("bert_fast")`,
    computes self-attention with `bert_fast.kernels.attention`, forward and backward, with dropout, on CPU and GPU;
    everything else stays transformers'. For the encoders that `bert_fast.fuse` supports, `fuse` is faster.

    Inputs may be padded, with a 2-D attention_mask, or flattened: one row with cu_seq_lens_q, cu_seq_lens_k,
    max_length_q and max_length_k, or with position_ids that restart. The output is zeros at padding.

    A call that the kernels don't have (causal or sliding-window attention, cross-attention, a 3-D or 4-D mask, values
    with another head dimension) runs transformers' own "sdpa"; a UserWarning names each reason once.

    Raises:
        ImportError: transformers 5 is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import bidirectional_mask_function  # noqa: F401
    except ImportError as error:
        raise ImportError("bert_fast.register needs transformers 5 or newer: pip install 'transformers>=5'") from error
    AttentionInterface.register(REGISTERED_NAME, _attention)
    AttentionMaskInterface.register(REGISTERED_NAME, _mask)


def _mask(*, mask_function: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    """The 2-D mask for attention to every token; for other attention transformers' 4-D mask."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    config = options.get("config")
    is_encoder = not any(getattr(config, name, False) for name in ("is_encoder_decoder", "add_cross_attention"))
    whole = options["q_length"] == options["kv_length"] and not options.get("q_offset") and not options.get("kv_offset")
    if mask_function is bidirectional_mask_function and is_encoder and whole:
        return attention_mask
    mask: Tensor | None = sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **options)
    return mask


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """query (B, N, S, D), key and value (B, n, S, D), n a divisor of N, -> (B, S, N, D)."""
    B, N, S, D = query.shape
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    reason = _why_not(query, key, value, attention_mask, options, causal=causal)
    arguments = {name: options.get(name) for name in _SEQUENCES}
    flattened = flattened_of(getattr(module, "config", _Registered), {**arguments, "attention_mask": None}, (B, S), 0)
    if attention_mask is not None and attention_mask.dim() == 2:
        flattened = None  # the mask takes precedence, as in transformers
    if reason is not None:
        _warn_once(reason)
        if flattened is not None:
            attention_mask = _within_sequences(attention_mask, flattened.cu_seqlens, S, causal=causal)
        elif attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :]
        options = {name: x for name, x in options.items() if name not in _SEQUENCES}
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, options)
    if (groups := N // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    qkv = torch.stack([query, key, value]).permute(1, 3, 0, 2, 4)  # (B, S, 3, N, D)
    if flattened is not None:
        cu_seqlens, max_seqlen = flattened.cu_seqlens, flattened.max_seqlen
    elif attention_mask is None:
        cu_seqlens, max_seqlen = torch.arange(B + 1, dtype=torch.int32, device=query.device) * S, S
    else:
        qkv, indices, cu_seqlens, max_seqlen = unpad(qkv, attention_mask)
        out = attention(qkv, cu_seqlens, max_seqlen, softmax_scale=scaling, dropout_p=dropout)
        return pad(out, indices, B, S), None
    out = attention(qkv.flatten(0, 1), cu_seqlens, max_seqlen, softmax_scale=scaling, dropout_p=dropout)
    return out.view(B, S, N, D), None


_SEQUENCES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids")


def _within_sequences(mask: Tensor | None, cu_seqlens: Tensor, length: int, *, causal: bool) -> Tensor:
    """A 4-D mask of flattened inputs, in which a token attends to its own sequence only."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    sequences = torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)
    within = sequences[:, None] == sequences[None, :]
    if causal and mask is None:
        within = within & (tokens[:, None] >= tokens[None, :])
    within = within[None, None]
    if mask is None:
        return within
    return mask & within if mask.dtype == torch.bool else mask.masked_fill(~within, torch.finfo(mask.dtype).min)


class _Registered:
    """A configuration with this implementation, for `flattened_of`."""

    _attn_implementation = REGISTERED_NAME


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any], *, causal: bool
) -> str | None:
    """Why transformers' "sdpa" computes this call, or None."""
    if causal:
        return "the attention is causal"
    if given := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        return f"{given[0]} was passed"
    if mask is not None and mask.dim() != 2:
        return f"the attention mask has {mask.dim()} dimensions"
    if key.shape != value.shape or key.shape[2:] != query.shape[2:] or query.shape[1] % key.shape[1]:
        return "queries, keys and values have other shapes than in self-attention"
    if mask is not None and mask.shape != (query.shape[0], query.shape[2]):
        return "the attention mask has another shape than the tokens"
    shape = (query.shape[0], query.shape[2])
    return why_not_flattened({**options, "attention_mask": mask}, shape, query.shape[2])


def _warn_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"bert_fast.register: this call runs transformers' sdpa, because {reason}", UserWarning, stacklevel=5
        )


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
    )
    return out
