"""The stack of layers, on packed tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_fast.kernels._common.philox import new_rng_state
from bert_fast.kernels._common.times import size_of_sequences
from bert_fast.models.config import BertConfig
from bert_fast.models.fast_path import LayerFastPath, LayerOps
from bert_fast.models.inputs import Tokens
from bert_fast.models.layers import BertLayer

DROPOUTS_PER_LAYER = 3  # attention probabilities, attention output, layer output


class EncoderOutput(NamedTuple):
    """What the encoder returns; hidden_states and attentions are empty where they were not requested."""

    hidden: Tensor  # (T, E)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (T, E)
    attentions: tuple[Tensor, ...]  # L of (B, N, max_seqlen, max_seqlen)


class BertEncoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.head_size = config.hidden_size // config.num_attention_heads
        self.attention_dropout_p = config.attention_probs_dropout_prob

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens,
        rng_states: Tensor | None,
        *,
        output_rows: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """All layers.

        Args:
            hidden: (T, E).
            rng_states: int64 (3L, 2), or None for no dropout.
            output_rows: int64 (R,), the only rows that the last layer computes after its attention; None for all.

        Returns:
            hidden (T, E), or (R, E), and what was requested of the layers.
        """
        hidden_states, attentions = [hidden], []
        sequences = (tokens.cu_seqlens, tokens.max_seqlen)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        dropout_p = 0.0 if rng_states is None else self.attention_dropout_p
        size = size_of_sequences(hidden.shape[0], tokens.max_seqlen, self.head_size, dropout_p)
        ops = None if checkpointing else LayerOps.select(hidden, size)
        for index, layer in enumerate(self.layer):
            states = None if rng_states is None else rng_states[DROPOUTS_PER_LAYER * index :][:DROPOUTS_PER_LAYER]
            rows = output_rows if index == len(self.layer) - 1 else None
            fast_path = None if ops is None else LayerFastPath.from_layer(layer, hidden)
            if output_attentions:
                assert isinstance(layer, BertLayer)
                attentions.append(layer.attention.self.probabilities(hidden, *sequences))
            if ops is not None and fast_path is not None:
                hidden = fast_path.run(ops, hidden, *sequences, states, rows)
            elif checkpointing:
                # The second run drops what the first dropped: that depends on `states` only.
                hidden = checkpoint(
                    layer, hidden, *sequences, states, rows, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = layer(hidden, *sequences, states, rows)
            if output_hidden_states:
                hidden_states.append(hidden)
        return EncoderOutput(hidden, tuple(hidden_states) if output_hidden_states else (), tuple(attentions))


def draw_rng_states(config: BertConfig, device: torch.device) -> Tensor | None:
    """Draw the dropout state of the embeddings and of every place of dropout in the layers from torch's generator.

    Returns:
        int64 (1 + 3L, 2); None, with nothing drawn, where the configuration has no dropout.
    """
    if config.hidden_dropout_prob == 0.0 and config.attention_probs_dropout_prob == 0.0:
        return None
    return new_rng_state(device, 1 + DROPOUTS_PER_LAYER * config.num_hidden_layers)
