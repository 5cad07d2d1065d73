"""The masked-language-model head and its cross entropy, computed for the labelled rows only."""

from bert_fast.kernels.masked_lm_loss.api import MaskedLMLoss, masked_lm_loss

__all__ = ["MaskedLMLoss", "masked_lm_loss"]
