# SPDX-License-Identifier: Apache-2.0
"""Every error that a client or another process may see, as one small tree.

Each class carries its HTTP status, OpenAI's ``type`` and a ``code``; an instance adds the message and, where one
field is to blame, ``param``. The same four travel between processes (`to_wire`, `from_wire`), so that a refusal in an
encode worker reaches the client as the refusal it was. Anything else is a defect: it is logged where it happened and
leaves the process as `InternalError` without its text.
"""

from __future__ import annotations

from typing import Any

MAX_MESSAGE = 1500
"""Characters of a message that leave the process: keeps the whole reply below 2 KB."""


class EpdError(Exception):
    """Base of the tree. ``retry_after`` is in seconds, or None."""

    status = 500
    type = "internal_error"
    code: str | None = "internal_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message[:MAX_MESSAGE])
        self.message = message[:MAX_MESSAGE]
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def to_wire(self) -> dict[str, Any]:
        """The error as a small JSON-able dict, for a reply between processes."""
        wire: dict[str, Any] = {"class": type(self).__name__, "message": self.message, "code": self.code}
        if self.param is not None:
            wire["param"] = self.param
        if self.retry_after is not None:
            wire["retry_after"] = self.retry_after
        return wire

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(EpdError):
    """The request itself is wrong; sending it again cannot help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class UrlNotAllowed(InvalidRequest):
    code = "url_not_allowed"


class MediaError(InvalidRequest):
    """A picture that could not be fetched or decoded; its ``code`` says which."""

    code = "invalid_image"


class MediaTooLarge(MediaError):
    code = "media_too_large"


class MediaTimeout(MediaError):
    code = "media_timeout"


class ImageTooLarge(MediaError):
    code = "image_too_large"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code = "payload_too_large"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class RequestTimeout(InvalidRequest):
    """The client was too slow to send what it began."""

    status = 408
    code = "request_timeout"


class UrlTooLong(InvalidRequest):
    status = 414
    code = "url_too_long"


class HeadersTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class Unauthorized(EpdError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    challenge = "Bearer"
    """How a client is to say who it is (``WWW-Authenticate``)."""


class NotFound(EpdError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Gone(NotFound):
    """It was there, and the client was told until when."""

    status = 410
    code = "expired"


class ModelNotFound(NotFound):
    code = "model_not_found"


class RateLimited(EpdError):
    """A tenant's own limit; others are not at theirs."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Overloaded(EpdError):
    """A bound was reached (queue, arena, rate): the same request may succeed later."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, **fields: Any):
        fields.setdefault("retry_after", 1.0)
        super().__init__(message, **fields)


class StageUnavailable(EpdError):
    """No live worker of a stage is left, or the retries of this request are spent."""

    status = 503
    type = "service_unavailable"
    code = "stage_unavailable"

    def __init__(self, message: str, **fields: Any):
        fields.setdefault("retry_after", 1.0)
        super().__init__(message, **fields)


class DeadlineExceeded(EpdError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class InternalError(EpdError):
    """What a client sees of a defect: no text of the exception, no traceback."""


class Retryable(EpdError):
    """Between processes only: this worker could not, another one (or the same one, asked afresh) can."""

    status = 503
    type = "service_unavailable"
    code = "retryable"


class HandOffFailed(Retryable):
    """Bytes promised by a handle could not be had, or not be trusted: owner gone, lease over, digest wrong."""

    code = "hand_off_failed"


class StaleHandle(HandOffFailed):
    """The owner has restarted, or the slot was given to someone else."""

    code = "stale_handle"


class LeaseExpired(HandOffFailed):
    code = "lease_expired"


class DigestMismatch(HandOffFailed):
    code = "digest_mismatch"


class TransferTimeout(HandOffFailed):
    code = "transfer_timeout"


class WorkerLost(Retryable):
    """The process that was answering is gone, before or within its reply."""

    code = "worker_lost"


class Preempted(Retryable):
    """The decode engine took the request's KV blocks away; it cannot rebuild them from placeholder tokens."""

    code = "preempted"


def _tree(root: type[EpdError]) -> dict[str, type[EpdError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(wire: dict[str, Any]) -> EpdError:
    """The error that `to_wire` described. An unknown class becomes `InternalError`."""
    cls = _tree(EpdError).get(wire.get("class", ""), InternalError)
    return cls(
        str(wire.get("message", "")),
        param=wire.get("param"),
        code=wire.get("code"),
        retry_after=wire.get("retry_after"),
    )
