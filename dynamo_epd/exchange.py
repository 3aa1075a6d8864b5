# SPDX-License-Identifier: Apache-2.0
"""Arenas over the graph: how a service offers its own to readers, and how it finds its peers'.

The NIXL metadata of an arena is asked for over the control plane, once a peer (`Arena` caches it): its owner is named
``namespace/component/instance``, and answers on an endpoint that `ArenaOwner` adds to the service. Readers shake hands
with owners as these appear, and not when the first request waits for it: a card over NATS and NIXL's connection take as
long as a hundred hand-offs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from dynamo_epd.errors import EpdError, HandOffFailed
from dynamo_epd.given import Given
from dynamo_epd.sdk import dynamo_context, endpoint, on_drain
from dynamo_epd.sdk.client import EndpointClient, ServiceClient

if TYPE_CHECKING:
    from dynamo_epd.transfer import Arena
    from dynamo_epd.transfer.handle import Handle


log = logging.getLogger(__name__)

FETCHED_SECONDS = 0.05
"""From one look of an arena that is to be closed at its leases to the next."""
MEET_SECONDS = 0.5
"""From one look for owners that are new to the next."""
MEET_AGAIN_SECONDS = 10.0
"""At least, until an owner that could not be met is tried again: most often it has died, and nobody knows yet."""


class CardQuery(msgspec.Struct, frozen=True):
    """Asks an arena's owner how to READ from it."""


class CardReply(msgspec.Struct, frozen=True):
    card: bytes
    """`Arena.metadata`."""


class ArenaOwner:
    """A service with one arena, ``self.arena``, between `open_arena` and `close_arena`."""

    arena: Arena
    reads: tuple[str, ...] = ()
    """Services whose arenas this one READs from. Each costs a watch of discovery, which are few: see `connect`."""
    _meeting: asyncio.Task[None] | None = None

    async def open_arena(self, nbytes: int) -> None:
        """Maps and registers ``nbytes`` of host memory."""
        from dynamo_epd.transfer import Arena

        address = dynamo_context["owner_addresses"][dynamo_context["service_name"]]
        owner = "/".join((*address, str(dynamo_context["instance_id"])))
        self._given: Given[str] = Given()
        await connect_owners(self.reads)
        self.arena = await Arena.open(nbytes, owner=owner, resolve=card_of)
        if _clients:
            self._meeting = asyncio.create_task(self._meet_owners())

    async def _meet_owners(self) -> None:
        """Shakes hands with each owner once it is there; one that does not answer keeps no other waiting."""
        meetings: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                there = set(owners())
                # One whose owner has gone ends by itself: its handshake may be under way.
                meetings = {owner: task for owner, task in meetings.items() if owner in there or not task.done()}
                for owner in there - meetings.keys():
                    meetings[owner] = asyncio.create_task(self._meet(owner))
                await asyncio.sleep(MEET_SECONDS)
        finally:
            for task in meetings.values():
                task.cancel()
            await asyncio.gather(*meetings.values(), return_exceptions=True)

    async def _meet(self, owner: str) -> None:
        """Shakes hands with ``owner``, in as many tries as that takes while it is there."""
        while True:
            try:
                await self.arena.connect(owner)
            except EpdError as error:  # it is met again, at the latest by the first who READs from it
                log.info("%s is not met: %s", owner, error.message)
            except Exception:
                log.exception("%s is not met", owner)
            else:
                return
            await asyncio.sleep(MEET_AGAIN_SECONDS)
            if owner not in owners():
                return

    @on_drain
    async def fetched(self) -> None:
        """Waits until everything that was laid out for others is fetched, given back, or has outlived its lease."""
        while self.arena.stats().leases:
            await asyncio.sleep(FETCHED_SECONDS)

    async def close_arena(self) -> None:
        """Refuses what waits and gives the memory back."""
        if self._meeting is not None:
            self._meeting.cancel()
            await asyncio.gather(self._meeting, return_exceptions=True)
        await self.arena.close()

    @endpoint(addressed=True)
    async def arena_card(self, query: CardQuery) -> AsyncIterator[CardReply]:
        """How to READ from this arena."""
        yield CardReply(self.arena.metadata())

    async def offer(
        self, value: Any, seconds: float, *, ends_on_read: bool = True, renewed_within: float = math.inf
    ) -> Handle:
        """Lays a tensor or bytes into the arena, leased as `Arena.lease` says. Raises what `Arena.reserve` raises."""
        nbytes = value.nbytes if hasattr(value, "nbytes") else len(value)
        with await self.arena.reserve([nbytes], timeout=seconds) as (slot,):
            slot.write(value)
            return self.arena.lease(slot.publish(), seconds, ends_on_read=ends_on_read, renewed_within=renewed_within)

    def give(self, request_id: str, handle: Handle) -> bool:
        """Notes who gets this lease. False, and the lease is ended, where that caller has left already."""
        given = self._given.give(request_id, handle.lease)
        if not given:
            self.arena.release(handle.lease)
        return given

    def end_leases(self, leases: Sequence[str], request_ids: Sequence[str]) -> None:
        """Ends leases, and all of callers that have left, whether or not they know of them."""
        for lease in leases:
            self.arena.release(lease)
        for request_id in request_ids:
            for lease in self._given.take_back(request_id):
                self.arena.release(lease)

    @asynccontextmanager
    async def prompt_images(self, images: Sequence[Any], timeout: float) -> AsyncIterator[list[Any]]:
        """A prompt's images as the engine takes them; READs those that have a handle, all at once.

        Args:
            images: messages with ``uuid``, ``handle`` (or None) and ``metadata``.
            timeout: seconds for the READ, waiting for room included.

        The tensors lie in the arena and are valid inside the block. Raises what `Arena.read` raises.
        """
        from dynamo_epd.engine.language import ImageInput

        handles = [image.handle for image in images if image.handle is not None]
        if not handles:
            yield [ImageInput(image.uuid, metadata=image.metadata) for image in images]
            return
        async with self.arena.read(handles, timeout=timeout) as tensors:
            views = iter(tensors)
            yield [
                ImageInput(image.uuid, next(views) if image.handle is not None else None, metadata=image.metadata)
                for image in images
            ]


def instance_of(handle: Handle) -> int:
    """The instance that a handle of this graph is of."""
    return int(handle.owner.rpartition("/")[2])


_clients: dict[str, ServiceClient] = {}


async def connect_owners(names: Sequence[str]) -> None:
    """Makes a client for the arena of each named service that the graph has. At start, and not when one is needed: see
    `ServiceClient.locate`."""
    graph, addresses = dynamo_context["graph"], dynamo_context["owner_addresses"]
    for name in names:
        if name in graph.services:
            client = ServiceClient(name, addresses[name], None)
            client.endpoints["arena_card"] = EndpointClient(client, "arena_card", CardReply)
            client.locate(dynamo_context["runtime"])
            _clients["/".join(addresses[name])] = client
    for client in _clients.values():
        await client.connect()


def owners() -> list[str]:
    """All whose arenas this process may READ from, as their handles name them."""
    return [f"{name}/{instance}" for name, client in _clients.items() for instance in client.instances()]


async def card_of(owner: str) -> bytes:
    """The metadata of ``owner``'s arena. Raises HandOffFailed for a name that is none, WorkerLost when it is gone."""
    name, _, instance = owner.rpartition("/")
    client = _clients.get(name)
    if client is None or not instance.isdigit():
        raise HandOffFailed("the handle names no owner in this graph")
    reply = await client.endpoints["arena_card"](CardQuery(), instance=int(instance)).only()
    return bytes(reply.card)
