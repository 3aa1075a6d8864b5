# SPDX-License-Identifier: Apache-2.0
"""Image jobs that survive: accepted ones sit in a JetStream work queue until their pictures are stored.

The queue holds what is to be done, a key-value bucket beside it how far each job is. A worker that takes a job says
every few seconds that it is at it; when it falls silent the queue delivers the job again. A job may therefore run
twice, but its pictures have names from the start and a store keeps the first of each name (`dynamo_epd.store`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import nats
from nats.errors import Error as NatsError
from nats.js.api import ConsumerConfig, DiscardPolicy, KeyValueConfig, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, BadRequestError, BucketNotFoundError, KeyNotFoundError, KeyWrongLastSequenceError

from dynamo_epd import tracing
from dynamo_epd.errors import EpdError, InternalError, InvalidRequest, NotFound, Overloaded, StageUnavailable
from dynamo_epd.http.images import WantedPicture
from dynamo_epd.sdk.nats import connect_options
from dynamo_epd.store import new_id

log = logging.getLogger(__name__)

Status = Literal["queued", "in_progress", "completed", "failed"]

RECONNECT_SECONDS = 0.5
REQUEST_SECONDS = 5.0
"""For one answer of NATS."""
FETCH_SECONDS = 5.0
"""A worker asks again after this long without a job."""
MAX_JOB_BYTES = 256 * 1024
JOB_ID = re.compile(r"job-[0-9a-f]{32}")
TOO_MANY = 10077
"""JetStream's error code of a stream that holds its most messages."""


@dataclass(frozen=True)
class JobsConfig:
    """Key ``jobs`` of the ``Frontend`` and ``ImageWorker`` sections."""

    max_waiting: int = 10_000
    """Jobs that may wait; one more is refused."""
    silence_seconds: float = 30.0
    """A worker that has not been heard of for this long is taken for dead, and its job is given to another."""
    attempts: int = 5
    """A job that was begun this often and never ended has killed its workers, and fails."""
    retry_seconds: float = 5.0
    """Until a job is tried again whose store or text encoder could not be reached. Such tries are no attempts."""
    keep_seconds: float = 86_400.0
    """How long a job may wait, and how long its state can be asked for."""


class Job(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is to be done. ``pictures``: the names, known from the start, under which they are stored."""

    id: str
    tenant: str
    wanted: WantedPicture
    pictures: list[str]
    created: float
    """Unix seconds."""


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

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed")


class KeyReused(InvalidRequest):
    """An idempotency key came with another body."""

    status = 422
    code = "idempotency_key_reused"


Run = Callable[[Job], Awaitable[None]]
"""Makes and stores a job's pictures. Raises `StageUnavailable` and the like where a later try may succeed."""


class JobQueue:
    """The queue and the states of one namespace. Every process that submits or works opens its own."""

    def __init__(self, namespace: str, config: JobsConfig):
        self._name = f"{namespace}_image_jobs"
        self._config = config
        self._connection: Any = None
        self._stream: Any = None
        self._working: asyncio.Task[None] | None = None

    async def open(self, url: str) -> None:
        """Connects, and makes the queue where there is none yet. Raises StageUnavailable without NATS or JetStream."""
        try:
            self._connection = await nats.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_SECONDS,
                error_cb=_log_error,
                name=self._name,
                **connect_options(),
            )
            self._stream = self._connection.jetstream(timeout=REQUEST_SECONDS)
            await self._make()
        except (NatsError, OSError) as error:
            raise StageUnavailable("the job queue cannot be reached") from error

    async def _make(self) -> None:
        config = self._config
        stream = StreamConfig(
            name=self._name,
            subjects=[self._name],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_msgs=config.max_waiting,
            max_age=config.keep_seconds,
            max_msg_size=MAX_JOB_BYTES,
        )
        try:
            await self._stream.add_stream(stream)
        except BadRequestError:  # it is there, with other bounds: this start's count
            await self._stream.update_stream(stream)
        try:
            self._states = await self._stream.key_value(self._name)
        except BucketNotFoundError:
            self._states = await self._stream.create_key_value(
                KeyValueConfig(bucket=self._name, ttl=2 * config.keep_seconds, storage=StorageType.FILE)
            )

    async def close(self) -> None:
        """Gives a job that runs here back to the queue, and disconnects."""
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close()

    async def submit(self, tenant: str, wanted: WantedPicture, n: int, *, digest: str, key: str | None) -> JobState:
        """Accepts a job of ``n`` pictures. The same ``key`` again gives the job that it gave before.

        ``digest``: of the body as the client sent it.

        Raises:
            KeyReused: ``key`` came with another body before.
            Overloaded: `JobsConfig.max_waiting` jobs wait.
            StageUnavailable: NATS cannot be reached, so nothing was accepted.
        """
        name = hashlib.sha256(f"{tenant}\0{key}".encode()).hexdigest()[:32] if key else uuid.uuid4().hex
        job = Job(f"job-{name}", tenant, wanted, [new_id() for _ in range(n)], time.time())
        state = JobState(job.id, tenant, digest, wanted.prompt, job.pictures, job.created)
        async with reaching():
            try:
                await self._states.create(job.id, msgspec.json.encode(state))
            except KeyWrongLastSequenceError:
                state, _ = await self._state(job.id)
                if state.digest != digest:
                    raise KeyReused("this idempotency key was used with another body") from None
                if state.status != "queued":
                    return state
                # Whoever accepted it may have died before it was in the queue: it is sent again, and is there once.
                job = msgspec.structs.replace(job, pictures=state.pictures, created=state.created)
            try:
                headers = {"Nats-Msg-Id": job.id}
                tracing.carry(headers)
                await self._stream.publish(self._name, msgspec.json.encode(job), headers=headers)
            except APIError as error:
                await self._states.purge(job.id)
                if error.err_code == TOO_MANY:
                    raise Overloaded(f"{self._config.max_waiting} jobs wait already; try again later") from error
                raise
        return state

    async def state(self, tenant: str, id: str) -> JobState:
        """How far a job is. Raises NotFound for one that never was, is forgotten or is another tenant's."""
        if JOB_ID.fullmatch(id):
            async with reaching():
                with contextlib.suppress(KeyNotFoundError):
                    state, _ = await self._state(id)
                    if state.tenant == tenant:
                        return state
        raise NotFound("there is no such job")

    async def _state(self, id: str) -> tuple[JobState, int]:
        entry = await self._states.get(id)
        return msgspec.json.decode(entry.value, type=JobState), entry.revision

    def work(self, run: Run) -> None:
        """Takes jobs, one after the other, until `close`."""
        self._working = asyncio.create_task(self._work(run))

    async def _work(self, run: Run) -> None:
        taking: Any = None
        while True:
            try:
                if taking is None:
                    config = ConsumerConfig(ack_wait=self._config.silence_seconds)
                    taking = await self._stream.pull_subscribe(self._name, durable=self._name, config=config)
                (message,) = await taking.fetch(1, timeout=FETCH_SECONDS)
            except TimeoutError:  # no job, or no NATS: it reconnects by itself
                continue
            except (NatsError, OSError) as error:
                log.warning("no job can be taken: %s", error)
                await asyncio.sleep(RECONNECT_SECONDS)
                continue
            try:
                async with self._kept(message):
                    await self._one(message, run)
            except (NatsError, OSError) as error:  # its end could not be said: it is delivered again
                log.warning("a job is left to be delivered again: %s", error)

    async def _one(self, message: Any, run: Run) -> None:
        """One delivery: it ends acknowledged, or given back."""
        try:
            job = msgspec.json.decode(message.data, type=Job)
            state, revision = await self._state(job.id)
        except (msgspec.MsgspecError, KeyNotFoundError):  # no job of ours, or one that is forgotten
            await message.term()
            return
        if state.over:
            await message.ack()
            return
        before = state
        error = self._hopeless(job, state)
        if error is None:
            state = msgspec.structs.replace(state, status="in_progress", attempts=state.attempts + 1)
            try:
                revision = await self._states.update(job.id, msgspec.json.encode(state), revision)
            except KeyWrongLastSequenceError:  # another delivery is at it
                await message.nak(self._config.retry_seconds)
                return
            try:
                with tracing.span("job", {"job.id": job.id}, kind="consumer", carrier=message.headers or {}):
                    await run(job)
            except (asyncio.CancelledError, Overloaded, StageUnavailable) as reason:
                # Not the job's fault: this worker leaves, or something it needs is away for a while.
                with contextlib.suppress(KeyWrongLastSequenceError):
                    back = msgspec.structs.replace(before, status="queued")
                    await self._states.update(job.id, msgspec.json.encode(back), revision)
                leaving = isinstance(reason, asyncio.CancelledError)
                await message.nak(None if leaving else self._config.retry_seconds)
                if leaving:
                    raise
                log.info("job %s waits: %s", job.id, reason)
                return
            except EpdError as found:
                error = found
            except Exception:
                log.exception("job %s broke off", job.id)
                await message.nak(self._config.retry_seconds)
                return
        await self._end(state, error)
        await message.ack()

    def _hopeless(self, job: Job, state: JobState) -> EpdError | None:
        if state.attempts >= self._config.attempts:
            return InternalError(f"the job was begun {state.attempts} times and never ended")
        if time.time() > job.created + self._config.keep_seconds:
            return StageUnavailable("the job waited longer than jobs are kept")
        return None

    async def _end(self, state: JobState, error: EpdError | None) -> None:
        """Says how the job ended, as soon as NATS can be told; the pictures are stored by now."""
        ended = msgspec.structs.replace(
            state,
            status="failed" if error else "completed",
            ended=time.time(),
            error=error.to_openai()["error"] if error else None,
        )
        while True:
            try:
                await self._states.put(state.id, msgspec.json.encode(ended))
                return
            except (NatsError, OSError) as lost:
                log.warning("the end of job %s cannot be told yet: %s", state.id, lost)
                await asyncio.sleep(RECONNECT_SECONDS)

    @asynccontextmanager
    async def _kept(self, message: Any) -> AsyncIterator[None]:
        """Tells the queue inside the block that somebody is at this delivery."""

        async def tell() -> None:
            while True:
                await asyncio.sleep(self._config.silence_seconds / 3)
                with contextlib.suppress(NatsError, OSError):
                    await message.in_progress()

        telling = asyncio.create_task(tell())
        try:
            yield
        finally:
            telling.cancel()


@asynccontextmanager
async def reaching() -> AsyncIterator[None]:
    """Makes what NATS raises where it is away a `StageUnavailable`."""
    try:
        yield
    except (NatsError, OSError, TimeoutError) as error:
        if isinstance(error, KeyNotFoundError | KeyWrongLastSequenceError):
            raise
        raise StageUnavailable("the job queue cannot be reached; nothing was accepted") from error


async def _log_error(error: Exception) -> None:
    log.info("job queue: %s", error)
