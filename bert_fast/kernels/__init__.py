"""Index of the rooms: the public functions, and what can run here."""

from bert_fast.kernels._common.dispatch import Availability, ImplUnavailableError, available_impls, use_impl
from bert_fast.kernels.bias_gelu import bias_gelu

__all__ = ["Availability", "ImplUnavailableError", "available_impls", "bias_gelu", "use_impl"]
