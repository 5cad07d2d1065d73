"""What is answered where a request can't be served: TEI's error types and their HTTP status."""

from __future__ import annotations


class ServeError(Exception):
    """An error whose message is sent to the client.

    Attributes:
        status: of HTTP.
        kind: TEI's error_type.
        headers: of the answer.
    """

    status, kind = 500, "Backend"

    def __init__(self, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.headers = headers or {}


class InvalidInputError(ServeError):
    """The body says something else than the route expects, or a text is longer than the model's maximum."""

    status, kind = 422, "Tokenizer"


class TooLargeError(ServeError):
    """More texts or bytes than the server takes in one request."""

    status, kind = 413, "Validation"


class MediaTypeError(ServeError):
    """The body is not announced as JSON."""

    status, kind = 415, "Validation"


class EmptyInputError(ServeError):
    """There is no text."""

    status, kind = 400, "Empty"


class UnknownModelError(ServeError):
    """No model has this name, or none has what the route computes."""

    status, kind = 404, "Validation"


class UnauthorizedError(ServeError):
    """The API key is missing or wrong."""

    status, kind = 401, "Unauthorized"


class OverloadedError(ServeError):
    """The queue is full."""

    status, kind = 429, "Overloaded"


class DeadlineError(ServeError):
    """The request was not answered within the time that the server allows."""

    status, kind = 504, "Timeout"


class StoppingError(ServeError):
    """The server is shutting down."""

    status, kind = 503, "Unhealthy"


class BackendError(ServeError):
    """The computation failed."""

    status, kind = 424, "Backend"


class DisconnectedError(ServeError):
    """The client has gone; nobody reads the answer."""

    status, kind = 499, "Disconnected"
