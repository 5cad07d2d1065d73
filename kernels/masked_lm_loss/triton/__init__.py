"""The Triton kernels of masked_lm_loss; operators.py launches them."""

from bert_fast.kernels.masked_lm_loss.triton.operators import masked_lm_loss_bwd, masked_lm_loss_fwd

__all__ = ["masked_lm_loss_bwd", "masked_lm_loss_fwd"]
