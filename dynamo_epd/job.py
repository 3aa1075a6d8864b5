# SPDX-License-Identifier: Apache-2.0
"""One job, and how far it is."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dynamo_epd.errors import EpdError
from dynamo_epd.http.images import WantedPicture

Status = Literal["queued", "in_progress", "completed", "failed"]


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be done. ``pictures``: the names, known from the start, under which they are stored."""

    id: str
    tenant: str
    wanted: WantedPicture
    pictures: list[str]
    created: float
    """Unix seconds."""
    digest: str = ""
    """As its state has it."""


class JobState(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a job is."""

    id: str
    tenant: str
    digest: str
    """Of what was asked: an idempotency key belongs to one body."""
    prompt: str
    pictures: list[str]
    created: float
    status: Status = "queued"
    attempts: int = 0
    ended: float | None = None
    error: dict[str, Any] | None = None
    """As in OpenAI's error object."""
    sent: bool = False
    """It is known to be in the queue: whoever asks again need not send it again, and so make a second one of it."""
    asked_again: bool = False
    """Somebody else counts on it by its idempotency key: who submitted it first cannot take it back."""

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed")

    def given_back(self) -> JobState:
        return msgspec.structs.replace(self, status="queued", sent=True)

    def end(self, error: EpdError | None, ended: float) -> JobState:
        """It has failed of ``error``, or is completed."""
        said = error.to_openai()["error"] if error else None
        status: Status = "failed" if error else "completed"
        return msgspec.structs.replace(self, status=status, ended=ended, error=said)


def state_of(job: Job) -> JobState:
    """Of a job that nobody has begun."""
    return JobState(job.id, job.tenant, job.digest, job.wanted.prompt, job.pictures, job.created)
