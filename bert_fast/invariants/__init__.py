"""Does an encoder still compute the same? Its invariants, for a model or a server, against its weights in float64."""

from bert_fast.invariants.checks import Finding, Row, Subject, check_encoder, check_hidden
from bert_fast.invariants.endpoint import Endpoint, EndpointError
from bert_fast.invariants.models import load_subject
from bert_fast.invariants.reference import Reference

__all__ = [
    "Endpoint",
    "EndpointError",
    "Finding",
    "Reference",
    "Row",
    "Subject",
    "check_encoder",
    "check_hidden",
    "load_subject",
]
