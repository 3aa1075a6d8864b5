# SPDX-License-Identifier: Apache-2.0
"""The serving side of an endpoint: decode, run the service's generator, send its items, and stop when the caller does.

The runtime drives every step of a handler in a task of its own. A service's generator would then see another task
after each yield, and `asyncio.timeout`, task groups and context variables would break in it. So it runs in one task
per request, and a bounded queue carries its frames.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from dynamo_epd import dropped, tracing
from dynamo_epd.errors import EpdError, InternalError, InvalidRequest, Overloaded, WorkerLost
from dynamo_epd.sdk import wire
from dynamo_epd.sdk.context import dynamo_context, request_context
from dynamo_epd.sdk.endpoints import Mark

log = logging.getLogger(__name__)

FRAMES_AHEAD = 64
"""Frames that a generator may be ahead of the network; then it waits."""


class InFlight:
    """How many requests this process is working on."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        self.count += 1
        self._idle.clear()

    def end(self) -> None:
        self.count -= 1
        if not self.count:
            self._idle.set()

    async def idle(self) -> None:
        await self._idle.wait()


class EndpointHandler:
    """Serves one endpoint of one service instance; ``handle`` is what the runtime is given."""

    def __init__(self, function: Callable[..., Any], mark: Mark, in_flight: InFlight):
        self.name = mark.name
        self._span = f"{dynamo_context.get('service_name', 'endpoint')}.{mark.name}"
        self._function = function
        self._limit = mark.max_in_flight
        self._running = 0
        self._in_flight = in_flight
        self._decode = wire.Decoder(wire.request_type(function))
        parameters = inspect.signature(function).parameters
        self._takes_request = any(name != "context" for name in parameters)
        self._takes_context = "context" in parameters
        dropped.watch(self.name)

    async def handle(self, raw: Any, context: Any) -> AsyncIterator[Any]:
        typed = isinstance(raw, bytes)
        if self._running >= self._limit:
            yield Overloaded(f"{self.name}: {self._limit} requests are running").to_wire()
            return
        try:
            request = self._decode(raw)
        except msgspec.ValidationError as error:
            dropped.count(self.name)
            yield InvalidRequest(f"{self.name}: {error}").to_wire()
            return
        except (ValueError, TypeError, msgspec.DecodeError, RecursionError):
            dropped.count(self.name)
            yield InvalidRequest(f"{self.name}: the request cannot be read").to_wire()
            return
        frames: asyncio.Queue[Any] = asyncio.Queue(FRAMES_AHEAD)
        self._running += 1
        self._in_flight.begin()
        work = asyncio.create_task(self._run(request, context, frames, typed))
        work.add_done_callback(self._end)
        left = False

        def leave(_: Any = None) -> None:
            nonlocal left  # once: a second cancel would interrupt the generator's own clean-up
            if not left:
                left = True
                work.cancel()

        stopped = asyncio.ensure_future(context.async_killed_or_stopped())
        stopped.add_done_callback(leave)
        work.add_done_callback(lambda _: stopped.cancel())
        try:
            if typed:
                async for frame in _framed(frames):
                    yield frame
            else:
                while (frame := await frames.get()) is not wire.END:
                    yield frame
        finally:
            leave()

    def _end(self, _: asyncio.Task[None]) -> None:
        self._running -= 1
        self._in_flight.end()

    async def _run(self, request: Any, context: Any, frames: asyncio.Queue[Any], typed: bool) -> None:
        request_context.set(context)
        arguments = ([request] if self._takes_request else []) + ([context] if self._takes_context else [])
        last: Any = wire.END
        try:
            carrier = context.metadata.copy() if tracing.ON else None
            with tracing.span(self._span, kind="server", carrier=carrier) as span:
                try:
                    await self._answer(arguments, frames, typed)
                except asyncio.CancelledError:
                    if not context.is_stopped():  # nobody left: the worker gave it up
                        span.fail(WorkerLost("given up"))
                    raise
        except EpdError as error:
            last = error.to_wire()
        except asyncio.CancelledError:
            while not frames.empty():  # most often nobody reads them; the last one lets the handler itself return
                frames.get_nowait()
            if not context.is_stopped():  # somebody waits for what was given up here, and would hear beats for ever
                last = WorkerLost(f"{self.name} was given up by its worker").to_wire()
        except Exception:  # the process boundary: anything unknown is logged here and leaves without its text
            log.exception("%s failed", self.name)
            last = InternalError("internal error").to_wire()
        if not typed and last is not wire.END:
            await frames.put({"error": last})
            last = wire.END
        await frames.put(last)

    async def _answer(self, arguments: list[Any], frames: asyncio.Queue[Any], typed: bool) -> None:
        replies = self._function(*arguments)
        if inspect.isawaitable(replies):
            await frames.put(_frame(await replies, typed))
            return
        try:
            async for item in replies:
                await frames.put(_frame(item, typed))
        finally:
            await replies.aclose()


async def _framed(frames: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    """The frames up to the last one, and beats while none comes."""
    loop = asyncio.get_running_loop()
    said = loop.time()
    timer: asyncio.TimerHandle

    def beat() -> None:  # one timer for all frames, not a timeout around each: see `Hearing`
        nonlocal timer, said
        if (now := loop.time()) >= said + wire.BEAT_SECONDS:
            said = now
            if frames.empty():
                frames.put_nowait(wire.BEAT)
        timer = loop.call_at(said + wire.BEAT_SECONDS, beat)

    timer = loop.call_later(wire.BEAT_SECONDS, beat)
    try:
        frame: Any = wire.BEAT
        while isinstance(frame, bytes) or frame is wire.BEAT:
            frame = await frames.get()
            while isinstance(frame, bytes) and not frames.empty():
                following = frames.get_nowait()
                if following is wire.END:
                    yield wire.LAST + frame
                    return
                yield frame
                frame = following
            said = loop.time()
            yield frame
    finally:
        timer.cancel()


def _frame(item: Any, typed: bool) -> Any:
    return wire.encode(item) if typed else wire.to_plain(item)
