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
from typing import Any

import msgspec
import nats
from nats.errors import Error as NatsError
from nats.js.api import (
    ConsumerConfig,
    DiscardPolicy,
    Header,
    KeyValueConfig,
    RetentionPolicy,
    StatusCode,
    StorageType,
    StreamConfig,
)
from nats.js.errors import (
    APIError,
    BadRequestError,
    BucketNotFoundError,
    KeyNotFoundError,
    KeyWrongLastSequenceError,
    NoStreamResponseError,
)

from dynamo_epd import dropped, tracing
from dynamo_epd.errors import (
    EpdError,
    Gone,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    Retryable,
    StageUnavailable,
)
from dynamo_epd.http.images import WantedPicture
from dynamo_epd.job import Job, JobState, state_of
from dynamo_epd.sdk.nats import connect_options
from dynamo_epd.store import new_id

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.5
PING_SECONDS = 2
"""From one question whether NATS is there to the next; without two answers it counts as away."""
REQUEST_SECONDS = 5.0
"""For one answer of NATS."""
FETCH_SECONDS = 1.0
"""A worker asks again after this long without a job. One that leaves waits for the answer: a job that crossed with the
calling off would lie here until this worker is taken for dead."""
ANSWER_SECONDS = 1.0
"""How much later than that the server's word of it may come."""
LOOK_SECONDS = 1.0
"""From one look of a worker at how many jobs wait to the next: as often as the planner looks."""
DEDUPLICATION_SECONDS = 120.0
"""JetStream's own default: a message that is sent again within this long is there once."""
TRIES = 10
"""To write a state that others write at the same time."""
MAX_JOB_BYTES = 512 * 1024
"""Two prompts of the longest kind, of characters that JSON spells with six bytes, and more."""
JOB_ID = re.compile(r"job-[0-9a-f]{32}")
TOO_MANY = 10077
"""JetStream's error code of a stream that holds its most messages."""


@dataclass(frozen=True)
class JobsConfig:
    """Pictures that wait their turn (key ``jobs``)."""

    max_waiting: int = 10_000
    """Jobs that may wait; one more is refused."""
    silence_seconds: float = 30.0
    """A worker that has not been heard of for this long is taken for dead, and its job is given to another."""
    attempts: int = 5
    """A job that was begun this often and never ended has killed its workers, and fails."""
    retry_seconds: float = 5.0
    """Until a job is tried again whose store or text encoder could not be reached. Such tries are no attempts."""
    keep_seconds: float = 86_400.0
    """How long a job may wait, and how long after its end its state can be asked for. For twice as long again it is
    remembered that there was one."""

    @property
    def queue_seconds(self) -> float:
        """How long a message stays: a job that waited too long is still delivered, and so fails clearly."""
        return 2 * self.keep_seconds

    @property
    def state_seconds(self) -> float:
        """How long a state stays after it was last written: longer than any message of its job."""
        return 3 * self.keep_seconds


class KeyReused(InvalidRequest):
    """An idempotency key came with another body."""

    status = 422
    code = "idempotency_key_reused"


Run = Callable[[Job, float], Awaitable[None]]
"""Makes and stores a job's pictures, which has lain in the queue for so many seconds. Raises `StageUnavailable` and the
like where a later try may succeed."""


class JobQueue:
    """The queue and the states of one namespace. Every process that submits or works opens its own."""

    def __init__(self, namespace: str, config: JobsConfig):
        self._name = f"{namespace}_image_jobs"
        self._config = config
        self._connection: Any = None
        self._stream: Any = None
        self._working: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self.waiting: int | None = None
        """Jobs that no worker has taken, as this one was told last. None where nobody can tell: there is no queue, or
        no NATS. A job that was given back is none of them: it is some worker's in a moment."""

    async def open(self, url: str) -> None:
        """Connects, and makes the queue where there is none yet. Raises StageUnavailable without NATS or JetStream."""
        try:
            self._connection = await nats.connect(
                url,
                max_reconnect_attempts=-1,
                reconnect_time_wait=RECONNECT_SECONDS,
                # A server whose host vanished says nothing for ever.
                ping_interval=PING_SECONDS,
                max_outstanding_pings=2,
                error_cb=_log_error,
                name=self._name,
                **connect_options(),
            )
            self._stream = self._connection.jetstream(timeout=REQUEST_SECONDS)
            await self._make(bounds=True)
        except (NatsError, OSError) as error:
            raise StageUnavailable("the job queue cannot be reached") from error

    async def _make(self, *, bounds: bool) -> None:
        """Makes the queue and the states where they are missing. ``bounds``: those that are there get this start's."""
        config = self._config
        queue = StreamConfig(
            name=self._name,
            subjects=[self._name],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=StorageType.FILE,
            discard=DiscardPolicy.NEW,
            max_msgs=config.max_waiting,
            max_age=config.queue_seconds,
            duplicate_window=min(DEDUPLICATION_SECONDS, config.queue_seconds),
            max_msg_size=MAX_JOB_BYTES,
        )
        try:
            await self._stream.add_stream(queue)
        except BadRequestError:  # it is there, with other bounds
            if bounds:
                await self._stream.update_stream(queue)
        try:
            self._states = await self._stream.key_value(self._name)
        except BucketNotFoundError:
            self._states = await self._stream.create_key_value(
                KeyValueConfig(bucket=self._name, ttl=config.state_seconds, storage=StorageType.FILE)
            )
        else:
            if bounds:
                states = (await self._stream.stream_info(f"KV_{self._name}")).config
                window = min(DEDUPLICATION_SECONDS, config.state_seconds)
                await self._stream.update_stream(states, max_age=config.state_seconds, duplicate_window=window)

    async def close(self) -> None:
        """Gives a job that runs here back to the queue, and disconnects: also where NATS is away, within seconds."""
        tasks = [task for task in (self._working, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._connection is not None:
            with contextlib.suppress(NatsError, OSError):  # where NATS is away, what was still to be said to it
                await self._connection.close()

    async def submit(self, tenant: str, wanted: WantedPicture, n: int, *, digest: str, key: str | None) -> JobState:
        """Accepts a job of ``n`` pictures. The same ``key`` again gives the job that it gave before.

        ``digest``: of the body as the client sent it.

        Raises:
            KeyReused: ``key`` came with another body before.
            Overloaded: `JobsConfig.max_waiting` jobs wait.
            StageUnavailable: NATS does not answer. The job may have been accepted all the same.
        """
        name = hashlib.sha256(f"{tenant}\0{key}".encode()).hexdigest()[:32] if key else uuid.uuid4().hex
        job = Job(f"job-{name}", tenant, wanted, [new_id() for _ in range(n)], time.time(), digest)
        async with reaching("the job queue does not answer; whether the job was accepted is not known"):
            try:
                return await self._accepted(job)
            except NoStreamResponseError:  # somebody has deleted the queue or the states
                await self._make(bounds=False)
                return await self._accepted(job)

    async def _accepted(self, job: Job) -> JobState:
        state, own = await self._claimed(state_of(job))
        if state.status != "queued" or state.sent:
            return state
        # Whoever accepted it before may have died before it was in the queue: it is sent again.
        job = msgspec.structs.replace(job, pictures=state.pictures, created=state.created)
        try:
            headers = {"Nats-Msg-Id": job.pictures[0]}  # the job's id may have been an older one's with the same key
            tracing.carry(headers)
            await self._stream.publish(self._name, msgspec.json.encode(job), headers=headers)
        except APIError as error:
            if own is not None:
                with contextlib.suppress(APIError):  # it was asked for again
                    await self._states.delete(job.id, last=own)
            if error.err_code == TOO_MANY:
                raise Overloaded(f"{self._config.max_waiting} jobs wait already; try again later") from error
            raise
        if own is not None:
            with contextlib.suppress(KeyWrongLastSequenceError):  # it was asked for again, or is being worked on
                sent = msgspec.structs.replace(state, sent=True)
                await self._states.update(job.id, msgspec.json.encode(sent), own)
        return state

    async def _claimed(self, new: JobState) -> tuple[JobState, int | None]:
        """The state under ``new``'s id, which is ``new`` where there was none. With a revision it is this call's own:
        while the state has that one, nobody else counts on it."""
        for _ in range(TRIES):
            with contextlib.suppress(KeyNotFoundError, KeyWrongLastSequenceError):  # somebody else was quicker
                try:
                    return new, await self._states.create(new.id, msgspec.json.encode(new))
                except KeyWrongLastSequenceError:
                    written, revision = await self._state(new.id)
                state = self._seen(written)
                if self._is_forgotten(state):
                    return new, await self._states.update(new.id, msgspec.json.encode(new), revision)
                if state.digest != new.digest:
                    raise KeyReused("this idempotency key was used with another body")
                if state.status == "queued" and not state.asked_again:
                    state = msgspec.structs.replace(state, asked_again=True)
                    await self._states.update(new.id, msgspec.json.encode(state), revision)
                return state, None
        raise StageUnavailable("this idempotency key is used too often at once")

    async def state(self, tenant: str, id: str) -> JobState:
        """How far a job is. Raises NotFound for one that never was or is another tenant's, Gone for one whose time is
        over."""
        if JOB_ID.fullmatch(id):
            async with reaching("the job queue does not answer"):
                with contextlib.suppress(KeyNotFoundError):
                    state = self._seen((await self._state(id))[0])
                    if state.tenant == tenant:
                        if self._is_forgotten(state):
                            raise Gone("the job is not kept any more")
                        return state
        raise NotFound("there is no such job")

    async def _state(self, id: str) -> tuple[JobState, int]:
        entry = await self._states.get(id)
        return msgspec.json.decode(entry.value, type=JobState), entry.revision

    def _seen(self, state: JobState) -> JobState:
        """What is said of a job: one that has outlived its message has failed, though no worker was there to say so."""
        last = state.created + self._config.queue_seconds
        return state.end(waited_too_long(), last) if not state.over and time.time() > last else state

    def _is_forgotten(self, state: JobState) -> bool:
        return state.ended is not None and time.time() > state.ended + self._config.keep_seconds

    def work(self, run: Run, leaving: asyncio.Event | None = None) -> None:
        """Takes jobs, one after the other, until `close`, or until the one under way once ``leaving`` is set."""
        dropped.watch(dropped.JOBS)
        self._working = asyncio.create_task(self._work(run, leaving or asyncio.Event()))
        self._looking = asyncio.create_task(self._look())

    async def finished(self) -> None:
        """Waits for the job that runs here when this worker leaves. Called off, it leaves that one running."""
        if self._working is not None:
            await asyncio.wait([self._working])

    async def _look(self) -> None:
        while True:
            waiting = None
            try:
                waiting = (await self._stream.consumer_info(self._name, self._name)).num_pending
            except (NatsError, OSError):  # it is away, or somebody has deleted the queue: `_work` says so
                pass
            finally:
                self.waiting = waiting
            await asyncio.sleep(LOOK_SECONDS)

    async def _work(self, run: Run, leaving: asyncio.Event) -> None:
        while not leaving.is_set():
            try:
                return await self._take(run, leaving)
            except (NatsError, OSError) as error:  # a job whose end could not be said is delivered again
                log.warning("the queue is asked anew: %s", error)
            except Exception:
                log.exception("the queue is asked anew")
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _take(self, run: Run, leaving: asyncio.Event) -> None:
        """Takes jobs until ``leaving``, or something fails. What somebody has deleted meanwhile is made again."""
        await self._make(bounds=False)
        consumer = ConsumerConfig(
            name=self._name,
            durable_name=self._name,
            filter_subject=self._name,
            ack_wait=self._config.silence_seconds,
        )
        await self._stream.add_consumer(self._name, consumer)  # or updates the one that is there
        while not leaving.is_set():
            message = await self._next()
            if message is None:
                continue
            if leaving.is_set():
                await message.nak()
                return
            async with self._kept(message):
                await self._one(message, run)

    async def _next(self) -> Any | None:
        """The next delivery, or None after a while without one.

        One request is open at a time, until the server says that it is over: of two, each can be sent a job, and one of
        these would lie here while another worker has nothing to do. nats-py's ``fetch`` gives up before the server.
        Source: NATS ADR-13, on pull requests.

        Raises what nats-py does where the queue or its consumer is gone."""
        if not self._connection.is_connected:  # a request made now would go out then, beside the next one
            await asyncio.sleep(RECONNECT_SECONDS)
            return None
        ask = msgspec.json.encode({"batch": 1, "expires": int(FETCH_SECONDS * 1e9)})
        try:
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.{self._name}"
            until = FETCH_SECONDS + ANSWER_SECONDS
            # The old style: a delivery keeps the queue's subject, by which the new one cannot tell whose answer it is.
            message = await self._connection.request(subject, ask, timeout=until, old_style=True)
        except TimeoutError:  # NATS went away meanwhile
            return None
        status = (message.headers or {}).get(Header.STATUS)
        if status is None:
            return message
        if status == StatusCode.REQUEST_TIMEOUT:  # no job
            return None
        raise APIError.from_msg(message)

    async def _one(self, message: Any, run: Run) -> None:
        """One delivery: it ends acknowledged, or given back."""
        try:
            job = msgspec.json.decode(message.data, type=Job)
        except (msgspec.MsgspecError, ValueError, RecursionError):  # none of ours, or no UTF-8
            dropped.count(dropped.JOBS)
            await message.term()
            return
        try:
            state, revision = await self._state(job.id)
        except KeyNotFoundError:  # the states were lost, or kept for a shorter time
            state = state_of(job)
            revision = await self._states.create(job.id, msgspec.json.encode(state))
        if state.over:
            await message.ack()
            return
        before = state
        error = self._hopeless(job, state)
        if error is None:
            begun = await self._begin(state, revision)
            if begun is None:  # another delivery is at it
                await message.nak(self._config.retry_seconds)
                return
            before, state, revision = begun
            try:
                with tracing.span("job", {"job.id": job.id}, kind="consumer", carrier=message.headers or {}):
                    await run(job, _lain(message))
            except asyncio.CancelledError:  # this worker leaves, also where NATS is away: then it is delivered again
                with contextlib.suppress(NatsError, OSError):
                    await self._give_back(message, before, revision, None)
                raise
            except (Overloaded, StageUnavailable) as reason:  # not the job's fault: something is away for a while
                await self._give_back(message, before, revision, self._config.retry_seconds)
                log.info("job %s waits: %s", job.id, reason)
                return
            except (InternalError, Retryable) as broken:  # another stage's defect, which it has logged, or its end
                log.warning("job %s broke off: %s", job.id, broken)
                await message.nak(self._config.retry_seconds)
                return
            except EpdError as found:
                error = found
            except Exception:
                log.exception("job %s broke off", job.id)
                await message.nak(self._config.retry_seconds)
                return
        await self._end(state, revision, error)
        await message.ack()

    async def _begin(self, state: JobState, revision: int) -> tuple[JobState, JobState, int] | None:
        """Writes that a job is begun. The state before, the state now and its revision; None where somebody else has
        begun it. Whoever accepted the job may write at the same time that it is in the queue."""
        for _ in range(TRIES):
            begun = msgspec.structs.replace(state, status="in_progress", attempts=state.attempts + 1)
            try:
                return state, begun, await self._states.update(state.id, msgspec.json.encode(begun), revision)
            except KeyWrongLastSequenceError:
                written, revision = await self._state(state.id)
            if (written.status, written.attempts) != (state.status, state.attempts):
                return None
            state = written
        return None

    async def _give_back(self, message: Any, before: JobState, revision: int, seconds: float | None) -> None:
        """Makes a job what it was ``before`` it was begun, for a worker who takes it after ``seconds``."""
        with contextlib.suppress(KeyWrongLastSequenceError):
            await self._states.update(before.id, msgspec.json.encode(before.given_back()), revision)
        await message.nak(seconds)

    def _hopeless(self, job: Job, state: JobState) -> EpdError | None:
        if state.attempts >= self._config.attempts:
            return InternalError(f"the job was begun {state.attempts} times and never ended")
        if time.time() > job.created + self._config.keep_seconds:
            return waited_too_long()
        return None

    async def _end(self, state: JobState, revision: int | None, error: EpdError | None) -> None:
        """Says how the job ended, as soon as NATS can be told; the pictures are stored by now. What somebody else has
        said of its end stays."""
        ended = msgspec.json.encode(state.end(error, time.time()))
        while True:
            try:
                if revision is None:
                    written, revision = await self._state(state.id)
                    if written.over:
                        return
                await self._states.update(state.id, ended, revision)
                return
            except KeyWrongLastSequenceError:
                revision = None
            except KeyNotFoundError:  # the states were lost
                await asyncio.sleep(RECONNECT_SECONDS)
                with contextlib.suppress(NatsError, OSError):
                    await self._states.put(state.id, ended)
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


def _lain(message: Any) -> float:
    """Seconds since a message came into the queue, however often it was delivered since, those in which no graph ran
    among them. NATS may have a clock that is ahead of ours."""
    return max(0.0, time.time() - message.metadata.timestamp.timestamp())


def waited_too_long() -> EpdError:
    return StageUnavailable("the job waited longer than jobs are kept")


@asynccontextmanager
async def reaching(failure: str) -> AsyncIterator[None]:
    """Makes what NATS raises where it is away a `StageUnavailable` that says ``failure``."""
    try:
        yield
    except (NatsError, OSError, TimeoutError) as error:
        if isinstance(error, KeyNotFoundError | KeyWrongLastSequenceError):
            raise
        raise StageUnavailable(failure) from error


async def _log_error(error: Exception) -> None:
    log.info("job queue: %s", error)
