# SPDX-License-Identifier: Apache-2.0
"""Row 3: one embedding from an owner's memory to a reader's, from the handle in hand to the verified bytes.

Beside it, taken in turn for each repeat: NIXL itself (memory registered once on both sides, no digest), Dynamo's own
`dynamo.nixl_connect`, a plain copy, and the digest alone. The control message that brings the handle is not in it.
Where the connector fails, its own figures are missing, and no others.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import settled
from benchmarks.obedient import FAILURES, reason
from benchmarks.owners import MIB, ROOM, Owner, check, content, owner
from benchmarks.standing import rotated

NUMBER = 3
TITLE = "embedding hand-off, digest checked"
KIB = 1024
SIZES = {"4 KiB": 4 * KIB, "64 KiB": 64 * KIB, "1 MiB": MIB, "4 MiB": 4 * MIB, "32 MiB": 32 * MIB}
CONNECTOR = "nixl_connect"
SMALL, LARGE = ("4 KiB", "64 KiB"), ("4 MiB", "32 MiB")
AT_ONCE = 16
MOST = 0.3
"""Milliseconds of a hand-off to 64 KiB."""
FIRSTS = 5
"""Readers and owners made anew. One that shook hands when it started does not do so in its first hand-off, which is
then to take no longer than the next."""
WARM_UP = 3
ROUNDS = 5
"""Hand-offs one after another in a turn, of which the median is taken: the first finds in the processor's caches what
the arms before it left there."""
BOUND = 30.0

Take = Callable[[int], Awaitable[float]]
"""Has so many bytes laid out and READs them; the seconds of the READ."""


async def measure(repeats: int) -> Row:
    """The row. ``repeats``: of each size and arm, interleaved; at least 5."""
    setting = f"{repeats} repeats of each size by turns, {ROUNDS} rounds in a turn, two processes on one host"
    row = Row(NUMBER, TITLE, setting)
    with owner("arena") as source:
        await _measure_sizes(row, source, repeats)
        together, alone = await _at_once(source, repeats)
        row.samples.append(Samples(f"arena, {AT_ONCE} of 1 MiB at once, all", [1e3 * one for one in together], "ms"))
        fair = ratios(together, [AT_ONCE * one for one in alone])
        row.goals.append(Goal(f"{AT_ONCE} at once against {AT_ONCE} times one alone", fair, "≤", 2.0))
    handshakes, firsts = zip(*[await _first() for _ in range(FIRSTS)], strict=True)
    row.samples += [
        Samples("arena, the handshake at start-up", [1e3 * one for one in handshakes], "ms"),
        Samples("arena, 64 KiB, the first after start-up", [1e3 * one for one in firsts], "ms"),
    ]
    row.goals.append(Goal("64 KiB, the first after start-up", [1e3 * one for one in firsts], "≤", MOST, "ms"))
    row.notes.append(
        "at start-up a reader shakes hands with the owners that are there: here, as the stages of a graph do, which "
        "meet each other while they start"
    )
    return row


async def _measure_sizes(row: Row, source: Owner, repeats: int) -> None:
    async with _arms(source, row) as arms:
        settled()
        for name, nbytes in SIZES.items():
            seconds = await by_turns(arms, nbytes, repeats, row)
            row.samples += [Samples(f"{arm}, {name}", [1e3 * one for one in of], "ms") for arm, of in seconds.items()]
            row.goals += goals(name, seconds)


async def by_turns(arms: dict[str, Take], nbytes: int, repeats: int, row: Row) -> dict[str, list[float]]:
    """Seconds of each arm, after a warm-up. A connector that fails has none, and is taken out of the ``arms``."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(WARM_UP + repeats):
        for arm, take in rotated(arms, repeat):
            try:
                took = sorted([await take(nbytes) for _ in range(ROUNDS)])[ROUNDS // 2]
            except FAILURES as error:
                if arm != CONNECTOR:
                    raise
                _failed(row, error)
                del arms[arm], seconds[arm]
                continue
            if repeat >= WARM_UP:
                seconds[arm].append(took)
    return seconds


def goals(name: str, seconds: Mapping[str, list[float]]) -> Iterator[Goal]:
    """Of one size."""
    ours = seconds["arena"]
    if name in SMALL:
        yield Goal(f"{name}", [1e3 * one for one in ours], "≤", MOST, "ms")
        times = ratios(seconds[CONNECTOR], ours) if CONNECTOR in seconds else []
        yield Goal(f"{name}: {CONNECTOR} against it", times, "≥", 30.0)
    if name in LARGE:
        yield Goal(f"{name} against NIXL itself", ratios(ours, seconds["nixl"]), "≤", 1.3)


@asynccontextmanager
async def _arms(source: Owner, row: Row) -> AsyncIterator[dict[str, Take]]:
    """name → how it hands over. A connector that does not start is left out, and the row is told why."""
    async with AsyncExitStack() as stack:
        arms = {
            "arena": (await stack.enter_async_context(_arena_reader(source)))[0],
            "nixl": stack.enter_context(_by_nixl()),
            "copy": _copy,
            "digest": _digest,
        }
        try:
            arms[CONNECTOR] = stack.enter_context(_by_connector())
        except FAILURES as error:
            _failed(row, error)
        yield arms


def _failed(row: Row, error: Exception) -> None:
    row.notes.append(f"{CONNECTOR} failed: {reason(error)}")


@asynccontextmanager
async def _arena_reader(source: Owner) -> AsyncIterator[tuple[Take, float]]:
    """How it READs, and the seconds of its handshake."""
    import msgspec

    from dynamo_epd.transfer import Arena, Handle

    async def resolve(name: str) -> bytes:
        return base64.b64decode(source.card["card"])

    arena = await Arena.open(ROOM, owner="reader", resolve=resolve)

    async def take(nbytes: int) -> float:
        # In a thread: the owner may wait for room that notices of this loop's earlier READs give it.
        handle = msgspec.convert(await asyncio.to_thread(source.lay_out, nbytes), Handle)
        began = time.perf_counter()
        async with arena.read([handle], timeout=BOUND) as (value,):
            took = time.perf_counter() - began
            check(value, nbytes)
        return took

    try:
        began = time.perf_counter()
        await arena.connect("owner")
        yield take, time.perf_counter() - began
    finally:
        await arena.close()


@contextmanager
def _by_nixl() -> Iterator[Take]:
    from dynamo_epd.transfer.agent import Agent
    from dynamo_epd.transfer.memory import Memory

    with owner("nixl") as source:
        memory = Memory(ROOM)
        agent = Agent("reader", memory.address, memory.nbytes)
        peer = agent.add_peer(base64.b64decode(source.card["card"]))

        async def take(nbytes: int) -> float:
            laid_out = source.lay_out(nbytes)
            began = time.perf_counter()
            read = agent.read(peer, memory.address, laid_out["address"], nbytes, b"taken")
            while not read.poll():
                if time.perf_counter() - began > BOUND:
                    raise TimeoutError("NIXL did not end the READ")
            took = time.perf_counter() - began
            check(memory.bytes_at(0, nbytes), nbytes)
            return took

        yield take
        agent.remove_peer(peer)
        agent.close()


@contextmanager
def _by_connector() -> Iterator[Take]:
    with owner("connector") as source, owner("connector-reader") as reader:

        async def take(nbytes: int) -> float:
            for one in (source, reader):
                one.go_on()
            took = reader.take(nbytes, source.lay_out(nbytes))
            for one in (source, reader):
                one.pause()
            return took

        try:
            yield take
        finally:
            for one in (source, reader):
                one.go_on()


async def _copy(nbytes: int) -> float:
    source, target = content(nbytes), bytearray(b"\1") * nbytes  # written: its pages are there
    began = time.perf_counter()
    target[:] = source
    return time.perf_counter() - began


async def _digest(nbytes: int) -> float:
    from dynamo_epd.transfer.memory import digest_of

    source = content(nbytes)
    began = time.perf_counter()
    digest_of(source)
    return time.perf_counter() - began


async def _at_once(source: Owner, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds for all of `AT_ONCE` READs begun together, and for one alone, in turn."""
    import msgspec

    from dynamo_epd.transfer import Arena, Handle

    async def resolve(name: str) -> bytes:
        return base64.b64decode(source.card["card"])

    async def take(count: int) -> float:
        handles = [msgspec.convert(await asyncio.to_thread(source.lay_out, MIB), Handle) for _ in range(count)]

        async def one(handle: Handle) -> None:
            async with arena.read([handle], timeout=BOUND):
                pass

        began = time.perf_counter()
        await asyncio.gather(*(one(handle) for handle in handles))
        return time.perf_counter() - began

    arena = await Arena.open(ROOM, owner="crowd", resolve=resolve)
    try:
        await take(1)
        pairs = [(await take(AT_ONCE), await take(1)) for _ in range(repeats)]
    finally:
        await arena.close()
    return [together for together, _ in pairs], [alone for _, alone in pairs]


async def _first() -> tuple[float, float]:
    """Seconds of a reader's handshake, and of its first READ."""
    with owner("arena") as source:
        async with _arena_reader(source) as (take, handshake):
            return handshake, await take(64 * KIB)
