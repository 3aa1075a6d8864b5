# SPDX-License-Identifier: Apache-2.0
"""The transfer under fire: hand-offs between processes over NIXL, one in five of them with a fault that a seed chose.

    python -m benchmarks.fire                              # 10,000 hand-offs, 2,000 faults
    python -m benchmarks.fire --hand-offs 200 --faults 40 --seed 3
    python -m benchmarks.fire --record                     # and puts it into benchmarks/README.md

Every hand-off that gives bytes is compared with what was laid out, byte by byte and without the digest. Prints how long
good ones took, what caught the faults, and what the digest costs; `fire.json` holds it all. Exit status 0 when every
fault was caught, 1 when a wrong byte was handed on, a fault went unnoticed or a good hand-off was refused.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import shlex
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.arms import WORK
from benchmarks.figures import percentile, shown
from benchmarks.obedient import Obedient
from benchmarks.recorded import keep
from benchmarks.report import headline, machine
from dynamo_epd.errors import HandOffFailed
from dynamo_epd.transfer import Arena, Handle

KIB, MIB = 2**10, 2**20
SIZES = {"4 KiB": 4 * KIB, "64 KiB": 64 * KIB, "1 MiB": MIB, "5 MiB": 5 * MIB}
"""The largest goes in three pieces."""
WEIGHTS = (35, 45, 15, 5)
COMPANY = 4
"""Hand-offs of a group, read at once; every fourth group is one."""
ROOM = 96 * MIB
LEASE_SECONDS = 600.0
READ_SECONDS = 30.0
ANSWER_SECONDS = 60.0
LIFE = 25
"""Handles that an owner lays out before it is killed."""
LEFT = 5
"""Of these are still to be read when the owner comes back as another process."""
REUSE_SECONDS = 0.003
"""A slot is reused within this time of the beginning of its READ: before, in its midst, after."""
FAULTS = ("flipped byte", "truncation", "stale slot", "reuse", "expired lease", "dead peer")
PLANTED = "planted"
OTHER = 2**32
"""No hand-off's number: what a slot that is reused has then."""
DIGEST_REPEATS = 50


@dataclass(frozen=True)
class HandOff:
    """One of the plan. ``fault`` is empty for a good one."""

    number: int
    size: str
    fault: str = ""

    @property
    def nbytes(self) -> int:
        return SIZES[self.size]


@dataclass
class Tally:
    """What happened. Seconds by size, and apart for those that were read alone."""

    alone: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    together: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    faults: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By fault: errors that caught it, or `RIGHT`."""
    wrong: list[str] = field(default_factory=list)
    """Hand-offs that gave wrong bytes."""
    refused: list[str] = field(default_factory=list)
    """Good ones that failed."""

    @property
    def unnoticed(self) -> list[str]:
        """Faults that must be seen even where the bytes are still the right ones."""
        return [fault for fault, seen in self.faults.items() if fault != "reuse" and seen[RIGHT]]

    @property
    def passed(self) -> bool:
        return not (self.wrong or self.refused or self.unnoticed)


RIGHT = "right bytes"
"""A slot that was reused a moment too late: the READ was over."""


def content(number: int, nbytes: int) -> bytes:
    """What the ``number``-th hand-off lays out: the same in every process, no two alike."""
    import numpy

    return numpy.random.default_rng(number).bytes(nbytes)


def plan(hand_offs: int, faults: int, planted: int, seed: int) -> Iterator[list[HandOff]]:
    """Groups that are read at once; every fault kind as often as the others, where the seed puts it."""
    chance = random.Random(seed)
    kinds = [FAULTS[index % len(FAULTS)] for index in range(faults)] + [PLANTED] * planted
    kinds += [""] * (hand_offs - len(kinds))
    chance.shuffle(kinds)
    sizes = chance.choices(list(SIZES), WEIGHTS, k=len(kinds))
    ready = deque(
        HandOff(number, "5 MiB" if kind == "reuse" else size, kind)
        for number, (size, kind) in enumerate(zip(sizes, kinds, strict=True))
    )
    while ready:
        count = COMPANY if chance.random() < 0.25 else 1
        yield [ready.popleft() for _ in range(min(count, len(ready)))]


class Owner(Obedient):
    """The reader's end of an owner in a process of its own. Each answer is waited for."""

    def __init__(self, name: str):
        super().__init__(f"the owner {name!r}", [sys.executable, "-m", "benchmarks.fire", "--owner", name])
        self.card = base64.b64decode(self.answer()["card"])

    def lay_out(self, one: HandOff, seconds: float = LEASE_SECONDS) -> Handle:
        laid_out = self.ask("lay", number=one.number, nbytes=one.nbytes, seconds=seconds, wrong=one.fault == PLANTED)
        return msgspec.convert(laid_out, Handle)


class Fire:
    """One reader, one owner that lives, and one that is killed again and again."""

    def __init__(self, seed: int):
        self.tally = Tally()
        self._chance = random.Random(f"fire {seed}")
        self._owner = Owner("owner")
        self._cards = {"owner": self._owner.card}
        self._dead: deque[Handle] = deque()

    async def run(self, groups: Iterator[list[HandOff]]) -> Tally:
        try:
            self._arena = await Arena.open(ROOM, owner="reader", resolve=self._resolve)
            try:
                await self._arena.connect("owner")
                for group in groups:
                    await self._together(group)
            finally:
                await self._arena.close()
        finally:
            self._owner.kill()
        return self.tally

    async def _resolve(self, owner: str) -> bytes:
        return self._cards[owner]

    async def _together(self, group: Sequence[HandOff]) -> None:
        handles = [await self._handle(one) for one in group]
        reused = [handle for one, handle in zip(group, handles, strict=True) if one.fault == "reuse"]
        for handle in reused:
            after = self._chance.uniform(0, REUSE_SECONDS)
            self._owner.begin("overwrite", lease=handle.lease, offset=handle.offset, nbytes=handle.length, after=after)
        taken = await asyncio.gather(*map(self._read, handles))
        for _ in reused:
            self._owner.answer()
        for one, found in zip(group, taken, strict=True):  # now, for what is compared meanwhile holds a READ up
            self._judge(one, found, self.tally.alone if len(group) == 1 else self.tally.together)

    async def _handle(self, one: HandOff) -> Handle:
        """What the reader gets, the fault already in it, but for the reuse, which comes while it reads."""
        if one.fault == "dead peer":
            return await self._of_the_dead()
        handle = self._owner.lay_out(one, 0.05 if one.fault == "expired lease" else LEASE_SECONDS)
        if one.fault == "flipped byte":
            self._owner.ask("flip", offset=handle.offset + self._chance.randrange(one.nbytes))
        elif one.fault == "truncation":
            kept = self._chance.randrange(one.nbytes - 64)
            if self._chance.random() < 0.5:  # the handle ends too soon
                return msgspec.structs.replace(handle, length=kept, shape=(kept,))
            self._owner.ask("cut", offset=handle.offset + kept, nbytes=one.nbytes - kept)  # the bytes do
        elif one.fault == "stale slot":
            self._owner.ask("overwrite", lease=handle.lease, offset=handle.offset, nbytes=handle.length, after=0.0)
        return handle

    async def _of_the_dead(self) -> Handle:
        """A handle whose owner was killed; some of them have one that came back under its name, and died too."""
        if len(self._dead) <= LEFT:
            doomed = Owner("doomed")
            self._cards["doomed"] = doomed.card
            laid_out = [doomed.lay_out(HandOff(number, "64 KiB")) for number in range(LIFE)]
            await self._arena.connect("doomed")
            doomed.kill()
            self._dead += laid_out
        return self._dead.popleft()

    async def _read(self, handle: Handle) -> tuple[bytes, float] | HandOffFailed:
        """The bytes and the seconds that they took, or why there are none."""
        began = time.perf_counter()
        try:
            async with self._arena.read([handle], timeout=READ_SECONDS) as (value,):
                took = time.perf_counter() - began
                return bytes(value), took
        except HandOffFailed as error:
            return error

    def _judge(self, one: HandOff, found: tuple[bytes, float] | HandOffFailed, good: dict[str, list[float]]) -> None:
        if isinstance(found, HandOffFailed):
            self._failed(one, found)
        elif found[0] != content(one.number, one.nbytes):
            self.tally.wrong.append(f"hand-off {one.number} ({one.fault or 'no fault'}, {one.size})")
        elif one.fault:
            self.tally.faults[one.fault][RIGHT] += 1
        else:
            good[one.size].append(found[1])

    def _failed(self, one: HandOff, error: HandOffFailed) -> None:
        if one.fault:
            self.tally.faults[one.fault][type(error).__name__] += 1
        else:
            self.tally.refused.append(f"hand-off {one.number} ({one.size}): {type(error).__name__}: {error.message}")


def digest_seconds() -> dict[str, list[float]]:
    """Seconds of the digest alone, by size, of bytes that were touched just before."""
    from dynamo_epd.transfer.memory import digest_of

    seconds: dict[str, list[float]] = {}
    for size, nbytes in SIZES.items():
        value, seconds[size] = content(0, nbytes), []
        for _ in range(DIGEST_REPEATS):
            began = time.perf_counter()
            digest_of(value)
            seconds[size].append(time.perf_counter() - began)
    return seconds


def told(tally: Tally, digest: dict[str, list[float]]) -> Iterator[str]:
    """The report as lines of Markdown."""
    yield "| good hand-offs | count | p50 ms | p90 ms | p99 ms | longest ms |"
    yield "|---|---|---|---|---|---|"
    for name, by_size in (("alone", tally.alone), (f"{COMPANY} at once", tally.together), ("digest alone", digest)):
        for size in SIZES:
            if values := by_size.get(size):
                columns = [shown(1e3 * percentile(values, share)) for share in (0.5, 0.9, 0.99, 1.0)]
                yield f"| {size}, {name} | {len(values)} | {' | '.join(columns)} |"
    yield ""
    yield "| fault | injected | caught | by | the READ was first |"
    yield "|---|---|---|---|---|"
    for fault in FAULTS:
        if seen := tally.faults.get(fault):
            by = ", ".join(f"{error} {count}" for error, count in seen.most_common() if error != RIGHT)
            caught = seen.total() - seen[RIGHT]
            yield f"| {fault} | {seen.total()} | {caught} | {by} | {seen[RIGHT] if fault == 'reuse' else ''} |"
    yield ""
    yield from (f"WRONG BYTES HANDED ON: {one}" for one in tally.wrong)
    yield from (f"unnoticed: {fault}" for fault in tally.unnoticed)
    yield from (f"refused without a fault: {one}" for one in tally.refused[:10])
    if tally.passed:
        yield "No wrong byte was handed on."


async def own(name: str) -> None:
    """Lays out what it is asked for, and does to its memory what no caller could. Ends with its input."""

    async def nobody(owner: str) -> bytes:
        raise LookupError(owner)

    arena = await Arena.open(ROOM, owner=name, resolve=nobody)
    memory = arena._memory
    other = content(OTHER, max(SIZES.values()))

    async def lay(number: int, nbytes: int, seconds: float, wrong: bool) -> Any:
        with await arena.reserve([nbytes], ANSWER_SECONDS) as (slot,):
            slot.write(content(number, nbytes))
            if wrong:  # before the digest: nothing but a comparison can tell
                memory.bytes_at(slot.offset, 1)[0] ^= 1
            return msgspec.to_builtins(arena.lease(slot.publish(), seconds))

    async def flip(offset: int) -> Any:
        memory.bytes_at(offset, 1)[0] ^= 1 << offset % 8
        return {}

    async def cut(offset: int, nbytes: int) -> Any:
        memory.bytes_at(offset, nbytes)[:] = bytes(nbytes)
        return {}

    async def overwrite(lease: str, offset: int, nbytes: int, after: float) -> Any:
        await asyncio.sleep(after)
        arena.release(lease)
        memory.bytes_at(offset, nbytes)[:] = other[:nbytes]
        return {}

    commands = {one.__name__: one for one in (lay, flip, cut, overwrite)}
    print(json.dumps({"card": base64.b64encode(arena.metadata()).decode()}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        print(json.dumps(await commands[asked.pop("what")](**asked)), flush=True)
    await arena.close()


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fire", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hand-offs", type=int, default=10_000)
    parser.add_argument("--faults", type=int, default=2_000, help="how many of them have one")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--plant", type=int, default=0, help="so many wrong bytes that no digest can tell: must exit 1")
    parser.add_argument("--record", action="store_true", help="put what is said into benchmarks/README.md")
    parser.add_argument("--output", type=Path, default=WORK / "report")
    parser.add_argument("--owner", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.owner:
        asyncio.run(own(options.owner))
        return 0
    if min(options.faults, options.plant) < 0 or options.faults + options.plant > options.hand_offs:
        parser.error("--faults and --plant: no more than --hand-offs together")
    if options.record and options.plant:
        parser.error("--record: a run with wrong bytes that were planted is none")
    about, began = machine(), time.monotonic()
    groups = plan(options.hand_offs, options.faults, options.plant, options.seed)
    tally = asyncio.run(Fire(options.seed).run(groups))
    digest = digest_seconds()
    how = f"{options.hand_offs} hand-offs, seed {options.seed}, {time.monotonic() - began:.0f} s"
    command = shlex.join(["python", "-m", "benchmarks.fire", *given])
    text = "\n".join([headline(command, about, how), "", *told(tally, digest), ""])
    print(text, end="")
    options.output.mkdir(parents=True, exist_ok=True)
    whole = {
        "command": command,
        "hand_offs": options.hand_offs,
        "seed": options.seed,
        "machine": about,
        "alone_seconds": tally.alone,
        "together_seconds": tally.together,
        "digest_seconds": digest,
        "faults": tally.faults,
        "wrong": tally.wrong,
        "refused": tally.refused,
        "passed": tally.passed,
    }
    (options.output / "fire.json").write_text(json.dumps(whole) + "\n")
    if options.record:
        keep("fire", text, [options.output / "fire.json"])
    return 0 if tally.passed else 1


if __name__ == "__main__":
    sys.exit(main())
