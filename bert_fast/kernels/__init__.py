"""Index of the rooms: the public functions, and what can run here."""

from bert_fast.kernels._common.dispatch import Availability, ImplUnavailableError, available_impls, use_impl

__all__ = ["Availability", "ImplUnavailableError", "available_impls", "use_impl"]
