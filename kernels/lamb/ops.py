"""The implementations of lamb. The one there is runs eagerly and needs no operator of its own."""

from bert_fast.kernels._common.dispatch import Implementation, Room
from bert_fast.kernels.lamb.reference import lamb_step_reference

ROOM = Room("lamb", {"reference": Implementation(lamb_step_reference, None, None)}, choices=())
