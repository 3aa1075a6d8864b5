# SPDX-License-Identifier: Apache-2.0
"""Calling another service: choose an instance, send one message, read typed replies, and never hang on a dead peer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any, Literal, TypeVar

from dynamo_epd import tracing
from dynamo_epd.errors import (
    InternalError,
    PayloadTooLarge,
    Retryable,
    StageUnavailable,
    WorkerLost,
    from_wire,
)
from dynamo_epd.prefix import Seen
from dynamo_epd.sdk import wire
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.context import dynamo_context, request_context
from dynamo_epd.sdk.hearing import Hearing
from dynamo_epd.sdk.place import endpoint_path
from dynamo_epd.sdk.service import info_of

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Policy = Literal["round-robin", "least-loaded", "affinity", "kv"]
POLICIES: tuple[Policy, ...] = ("round-robin", "least-loaded", "affinity", "kv")
SUSPECT_SECONDS = 15.0
"""How long a lost instance is passed over: longer than discovery needs to forget a dead one (10 s lease)."""
HEADER_ROOM = 16 * 1024
"""Bytes of a NATS message that the runtime's own headers may take."""
FIRST_CONTACT_SECONDS = 0.5
FIRST_CONTACT_PAUSE = 0.05
"""The runtime enters an instance into discovery a moment before NATS routes to it. So an instance that has never
answered is asked again for that long, after such pauses. Nobody had received the request."""
PASSED_ON = 2
"""How often one call goes on to another instance: what ends those that take it must not go round them all."""
GONE_SECONDS = 0.25
"""From one look for an instance that has yet to take a request to the next. A supervisor takes the dead out of
discovery at once; one that leaves takes what it was sent before within that."""
FIRST_LOOK = 1.0
"""Seconds that the first call of an endpoint waits for discovery to tell its instances."""


class ServiceClient:
    """Every instance of one service, as seen from this process. False where the graph pruned the dependency.

    ``client.<endpoint>(request, instance=, key=, blocks=, exclude=)`` gives a `Call`.
    """

    def __init__(self, name: str, address: tuple[str, str] | None, service: type | None):
        self.name = name
        self.address = address
        self.endpoints: dict[str, EndpointClient] = {}
        self.policy: Policy = "round-robin"
        self._turn = 0
        self._in_flight: dict[int, int] = {}
        self._blocks_in_flight: dict[int, int] = {}
        self._seen = Seen()
        self._suspects: dict[int, float] = {}
        self._met: set[int] = set()
        if service is not None:
            for attribute, mark in info_of(service).marked("endpoint").items():
                self.endpoints[attribute] = EndpointClient(
                    self, mark.name, wire.reply_type(getattr(service, attribute)), addressed=mark.addressed
                )
        self._by_name = {one.name: one for one in self.endpoints.values()} | self.endpoints

    def __bool__(self) -> bool:
        return self.address is not None

    def __getattr__(self, name: str) -> EndpointClient:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._by_name:
            return self._by_name[name]
        if not self:
            raise StageUnavailable(f"{self.name} is not linked in this graph")
        raise AttributeError(f"{self.name} has no endpoint {name!r}; it has {', '.join(self.endpoints)}")

    @property
    def _first(self) -> EndpointClient | None:
        """The endpoint by which instances are counted: the first that takes from anybody, where there is one. An
        addressed one is left last by a worker that drains, and nobody else is given to that worker any more."""
        return min(self.endpoints.values(), key=lambda one: one.addressed, default=None)

    def locate(self, runtime: Any) -> None:
        """Names every endpoint to the runtime. Must precede all else that is asked of it.

        ``runtime.endpoint`` blocks on the runtime's threads with the GIL held. Once these have results to hand to
        Python they wait for the GIL, and the process stands still for good.
        """
        if self.address is not None:
            for one in self.endpoints.values():
                one.place = runtime.endpoint(endpoint_path(self.address, one.name))

    async def connect(self) -> None:
        """Starts watching discovery for the first endpoint; others are watched from their first call on.

        Each watch of the file discovery takes two of the user's inotify instances, of which Linux gives 128.
        """
        if self._first is not None:
            await self._first.connect()

    def route(self, policy: Policy) -> None:
        """How instances are chosen from now on.

        ``affinity`` needs a ``key`` with each call, else it takes turns. ``kv`` goes by the ``blocks`` of a call's
        prompt (`prefix.blocks_of`): the instance with the fewest blocks to prefill and in flight, as Dynamo's router
        weighs them; those of a call without any are least-loaded.
        """
        if policy not in POLICIES:
            raise ValueError(f"routing {policy!r} is none of {', '.join(POLICIES)}")
        self.policy = policy

    def instances(self) -> list[int]:
        """Ids of the live instances, in order; lost ones are left out at once."""
        return self._healthy(self._first.known()) if self._first is not None else []

    async def ready(self, timeout: float | None = None) -> None:
        """Returns once an instance is there. Raises StageUnavailable when none comes within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not self.instances():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise StageUnavailable(f"no {self.name} is running") from None

    def _healthy(self, known: list[int]) -> list[int]:
        now = time.monotonic()
        self._suspects = {one: until for one, until in self._suspects.items() if until > now}
        return [one for one in known if one not in self._suspects]

    def _choose(
        self,
        known: list[int],
        instance: int | None,
        key: str | None,
        exclude: Collection[int],
        blocks: Sequence[bytes] = (),
    ) -> int:
        if instance is not None:
            if instance not in known:
                raise WorkerLost(f"this {self.name} is gone")
            return instance
        # When every instance is under suspicion one is tried all the same: the fault may have been ours.
        allowed = [one for one in self._healthy(known) or known if one not in exclude]
        if not allowed:
            raise StageUnavailable(f"no {self.name} is running" if not known else f"no other {self.name} is left")
        if self.policy == "affinity" and key is not None:
            return max(allowed, key=lambda one: rendezvous_weight(key, one))
        self._turn += 1
        turn = self._turn % len(allowed)
        allowed = allowed[turn:] + allowed[:turn]
        if self.policy == "kv":
            self._seen.keep(known)
            return min(allowed, key=lambda one: self._cost(one, blocks))
        if self.policy == "least-loaded":
            return min(allowed, key=lambda one: self._in_flight.get(one, 0))
        return allowed[0]

    def _cost(self, instance: int, blocks: Sequence[bytes]) -> tuple[int, int, int]:
        to_prefill = len(blocks) - self._seen.overlap(instance, blocks)
        in_flight = self._blocks_in_flight.get(instance, 0)
        return to_prefill + in_flight, to_prefill, self._in_flight.get(instance, 0)

    def _begin(self, instance: int, blocks: Sequence[bytes] = ()) -> None:
        self._in_flight[instance] = self._in_flight.get(instance, 0) + 1
        self._blocks_in_flight[instance] = self._blocks_in_flight.get(instance, 0) + len(blocks)
        if self.policy == "kv":
            self._seen.note(instance, blocks)

    def _end(self, instance: int, *, lost: bool, answered: bool, blocks: int = 0) -> None:
        self._in_flight[instance] -= 1
        self._blocks_in_flight[instance] -= blocks
        if not self._in_flight[instance]:
            del self._in_flight[instance], self._blocks_in_flight[instance]
        if lost:
            self._suspects[instance] = time.monotonic() + SUSPECT_SECONDS
        elif answered:
            self._met.add(instance)
            self._suspects.pop(instance, None)


async def twice(work: Callable[[], Awaitable[Result]]) -> Result:
    """The result of ``work``, which is tried once more, elsewhere, where a worker or a hand-off is lost.

    Raises StageUnavailable, saying what was lost, when it is lost again.
    """
    with contextlib.suppress(Retryable):
        return await work()
    try:
        return await work()
    except Retryable as error:
        raise StageUnavailable(f"{error.message}; the request can be sent again") from error


def rendezvous_weight(key: str, instance: int) -> bytes:
    """Highest-random-weight hashing (Thaler and Ravishankar, 1998): only a lost instance's keys move."""
    return hashlib.blake2b(f"{instance}:{key}".encode(), digest_size=8).digest()


class EndpointClient:
    """One endpoint of a `ServiceClient`."""

    def __init__(self, service: ServiceClient, name: str, reply: Any, *, addressed: bool = False):
        self.service = service
        self.name = name
        self.addressed = addressed
        self.decode = wire.Decoder(reply)
        self.place: Any = None
        self.remote: Any = None
        self._connecting = asyncio.Lock()

    async def connect(self) -> None:
        if self.remote is not None or self.place is None:
            return
        async with self._connecting:  # each watch takes inotify instances: the first calls share one
            if self.remote is not None:
                return
            try:
                remote = await self.place.client()
            except Exception as error:  # the runtime raises plain Exception for all that can go wrong here
                if "os error 24" not in str(error):
                    raise
                raise ConfigError(
                    "this user has no inotify instance left for the file discovery: end other graphs, raise the sysctl "
                    "fs.inotify.max_user_instances (files: ulimit -n), or set DYN_DISCOVERY_BACKEND=etcd"
                ) from error
            first = self.service._first
            # of an addressed one the caller knows an instance, which may have left the first endpoint already
            if first is not None and first is not self and (self.addressed or first.known()):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_LOOK):
                        await remote.wait_for_instances()
            self.remote = remote

    def known(self) -> list[int]:
        return sorted(self.remote.instance_ids()) if self.remote is not None else []

    def __call__(
        self,
        request: Any = None,
        *,
        instance: int | None = None,
        key: str | None = None,
        blocks: Sequence[bytes] = (),
        exclude: Collection[int] = (),
    ) -> Call:
        """The call, not yet sent: the first ``__anext__`` chooses an instance and sends it."""
        return Call(self, request, instance, key, blocks, exclude)


class Call:
    """Async iterator of one call's replies.

    ``instance`` is the chosen instance's id from the first ``__anext__`` on, and ``taken`` says whether it took the
    request. Leaving early (``aclose``, cancellation,
    dropping it) closes the generator at the other end. Raises what the endpoint raised, if it is an EpdError;
    InternalError for anything else it raised; StageUnavailable with no instance to ask; WorkerLost when the instance
    cannot be reached or its stream breaks off; PayloadTooLarge above what NATS takes.
    """

    def __init__(
        self,
        endpoint: EndpointClient,
        request: Any,
        instance: int | None,
        key: str | None,
        blocks: Sequence[bytes],
        exclude: Collection[int],
    ):
        self.instance: int | None = None
        self.taken = False
        self._endpoint = endpoint
        self._request = request
        self._wanted = (instance, key, exclude)
        self._blocks = blocks
        self._context: Any = None
        self._stream: Any = None
        self._hearing = Hearing(endpoint.service.name)
        self._done = False
        self._answered = False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        if self._done:
            raise StopAsyncIteration
        try:
            if self._stream is None:
                await self._open()
            frame = await self._receive()
        except BaseException:
            self._finish(stop=True)
            raise
        if isinstance(frame, bytes):
            self._answered = True
            if frame.startswith(wire.LAST):
                self._finish(stop=False)
                frame = frame[len(wire.LAST) :]
            try:
                return self._endpoint.decode(frame)
            except BaseException as error:
                self._finish(stop=True)
                raise InternalError(f"{self._endpoint.service.name} sent a reply of another shape") from error
        self._answered = True
        self._finish(stop=False)
        if frame is wire.END:
            raise StopAsyncIteration
        if isinstance(frame, dict):
            raise from_wire(frame)
        raise InternalError(f"{self._endpoint.service.name} sent a reply of another shape")

    async def _open(self) -> None:
        from dynamo._core import Context

        service = self._endpoint.service
        payload = wire.encode(self._request)
        self._request = None
        await self._endpoint.connect()
        limit = dynamo_context.get("max_payload")
        if limit and len(payload) > limit - HEADER_ROOM:
            raise PayloadTooLarge(f"the request is too large for {service.name} ({len(payload)} bytes)")
        wanted, key, exclude = self._wanted
        tried = set(exclude)
        passed_on = 0
        while True:
            self.instance = service._choose(self._endpoint.known(), wanted, key, tried, self._blocks)
            served = request_context.get()
            self._context = Context() if served is None else served.detached(Context().id())
            if tracing.ON:
                tracing.carry(self._context.metadata)
            service._begin(self.instance, self._blocks)
            try:
                await self._send(payload, self.instance)
                return
            except Exception as error:  # the runtime raises plain Exception and ValueError for every kind of loss
                tried.add(self.instance)
                others = [one for one in service._healthy(self._endpoint.known()) if one not in tried]
                if wanted is not None or not others or passed_on == PASSED_ON:
                    raise self._lost(error) from error
                log.info("%s %s did not take a request, another one is asked: %s", service.name, self.instance, error)
            # It never took the request (it is leaving, say), stands still, or died with it in its hands: another one
            # can take it, and the caller need not know. Where it moves again it finds the request called off.
            passed_on += 1
            self._context.stop_generating()
            service._end(self.instance, lost=True, answered=False, blocks=len(self._blocks))
            self._context = None  # nothing is begun any more that `_finish` would end

    async def _send(self, payload: bytes, instance: int) -> None:
        begun = time.monotonic()
        while True:
            try:
                async with self._while_known(instance):
                    self._stream = await self._hearing.wait(
                        self._endpoint.remote.direct(payload, instance, annotated=False, context=self._context)
                    )
                self.taken = True
                return
            except Exception:  # see _open
                if instance in self._endpoint.service._met or time.monotonic() - begun > FIRST_CONTACT_SECONDS:
                    raise
            await asyncio.sleep(FIRST_CONTACT_PAUSE)

    @contextlib.asynccontextmanager
    async def _while_known(self, instance: int) -> AsyncIterator[None]:
        """Raises TimeoutError where ``instance`` leaves discovery and does not take the request either: it died with it
        in its hands, and NATS would have nobody to tell that for its whole time."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as bound:
            timer: asyncio.TimerHandle

            def look(was_known: bool) -> None:
                nonlocal timer
                known = instance in self._endpoint.known()
                if known or was_known:
                    timer = loop.call_later(GONE_SECONDS, look, known)
                else:
                    bound.reschedule(loop.time())

            timer = loop.call_later(GONE_SECONDS, look, True)
            try:
                yield
            finally:
                timer.cancel()

    async def _receive(self) -> Any:
        frame: Any = wire.BEAT
        try:
            while frame is wire.BEAT:
                frame = await self._hearing.wait(self._stream.__anext__())
            return frame
        except StopAsyncIteration:
            raise self._lost("the stream ended without its end marker") from None
        except Exception as error:  # see _open
            raise self._lost(error) from error

    def _lost(self, why: Any) -> WorkerLost:
        log.debug("%s %s lost: %s", self._endpoint.service.name, self.instance, why)
        self._finish(stop=True, lost=True)
        return WorkerLost(f"the {self._endpoint.service.name} that was asked went away")

    def _finish(self, *, stop: bool, lost: bool = False) -> None:
        if self._done:
            return
        self._done = True
        self._hearing.close()
        if stop and self._context is not None:
            self._context.stop_generating()
        self._stream = None
        if self._context is not None and self.instance is not None:
            service = self._endpoint.service
            service._end(self.instance, lost=lost, answered=self._answered, blocks=len(self._blocks))

    async def only(self) -> Any:
        """The reply of an endpoint that has exactly one, read to its end marker. Raises InternalError otherwise."""
        try:
            replies = [reply async for reply in self]
        finally:
            await self.aclose()
        if len(replies) != 1:
            raise InternalError(f"{self._endpoint.service.name} sent {len(replies)} replies, not one")
        return replies[0]

    async def aclose(self) -> None:
        """Leaves the call: the generator at the other end is closed."""
        self._finish(stop=True)

    def __del__(self) -> None:
        self._finish(stop=True)


_clients: dict[tuple[type, str], ServiceClient] = {}


def client_for(owner: type, attribute: str) -> ServiceClient:
    """The client behind ``owner``'s depends ``attribute`` in this process; a falsy one where nothing is linked."""
    if (owner, attribute) not in _clients:
        graph, addresses = dynamo_context.get("graph"), dynamo_context.get("addresses", {})
        target = graph.edges.get((owner, attribute)) if graph is not None else None
        address = addresses.get(target.__name__) if target is not None else None
        name = target.__name__ if target is not None else attribute
        _clients[owner, attribute] = ServiceClient(name, address, target)
    return _clients[owner, attribute]
