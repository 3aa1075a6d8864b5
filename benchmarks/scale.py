# SPDX-License-Identifier: Apache-2.0
"""How the graph grows: workers, streams and pictures, against engines that compute nothing but take their time.

    python -m benchmarks.scale
    python -m benchmarks.scale --record      # and puts it into benchmarks/README.md
    python -m benchmarks.scale --workers 2 --streams 1 2 --images 0 1 --seconds 1

The graph is `benchmarks.crowd`. Streams are clients that ask again as soon as they are answered. *Added* is what a
client waits for beyond the time that the doubles take: everything that is real. The wall is the first number of streams
at which requests a second fall short of what the doubles would allow, and what is then fully used. Writes `scale.json`
and `scale.png`. Exit status 1 when a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import shlex
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.arms import WORK, Arm, graph
from benchmarks.figures import percentile, shown
from benchmarks.load import Told, ask, chat, picture, session
from benchmarks.recorded import keep
from benchmarks.report import headline, machine
from models import untrained

TOKENS = 32
PREFILL_SECONDS, TOKEN_SECONDS = 0.03, 0.02
FORWARD_SECONDS, PICTURE_SECONDS = 0.004, 0.006
"""Assumed, of the order of a 7B LLaVA on one data-centre GPU."""
PROCESSES = 4
"""Over which the workers are spread, and the encode workers over half as many."""
PER_ENCODER = 8
"""Language workers for each encode worker."""
FEW = 8
"""Streams while workers or pictures grow."""
KEPT = 0.8
"""Share of the requests a second that the doubles would allow; below it is the wall."""
FULL = 0.85
"""Of a core, or of all of them: fully used."""
DISTURBED = 0.15
"""Of all cores: so much taken by others, and a wall says nothing of this graph."""
WARM_UP_SECONDS = 2.0
START_SECONDS = 120.0
CONFIG = """
Common: {dtype: float32, max-model-len: 2048, limit-mm-per-prompt: {image: 8}}
Frontend: {ui: false, admission: {max-in-flight: 4096}}
Processor: {common-configs: [model, dtype, max-model-len, served-model-name, limit-mm-per-prompt]}
"""


@dataclasses.dataclass
class Point:
    """One load. Seconds; ``cores`` by service, all of its processes together, and ``busiest`` of one process."""

    workers: int
    streams: int
    images: int
    requests: int
    failed: list[str]
    requests_a_second: float
    allowed: float
    """Requests a second if nothing were added."""
    added_first: list[float]
    """To the first token."""
    added_whole: list[float]
    """To the whole answer."""
    cores: dict[str, float]
    busiest: tuple[str, float]
    others: float
    """Cores that were taken by what is no part of this."""

    @property
    def kept(self) -> float:
        return self.requests_a_second / self.allowed


def config_of(workers: int, processes: int = PROCESSES) -> str:
    """The graph's configuration: ``workers`` language workers, and encode workers for them. All processes of a kind
    have equally many: they are as many as divide the workers, ``processes`` at most."""
    sections = [CONFIG]
    decode = {"prefill-seconds": PREFILL_SECONDS, "token-seconds": TOKEN_SECONDS}
    encode = {"forward-seconds": FORWARD_SECONDS, "picture-seconds": PICTURE_SECONDS}
    for name, count, most, own in (
        ("CrowdWorker", workers, processes, decode),
        ("CrowdEncodeWorker", math.ceil(workers / PER_ENCODER), math.ceil(processes / 2), encode),
    ):
        over = max(one for one in range(1, most + 1) if count % one == 0)
        shared = {"common-configs": ["model", "dtype", "max-model-len"]}
        whole = shared | own | {"members": count // over, "ServiceArgs": {"workers": over}}
        sections.append(f"{name}: {json.dumps(whole)}\n")
    return "".join(sections)


async def measure(
    workers: Sequence[int],
    streams: Sequence[int],
    images: Sequence[int],
    seconds: float,
    processes: int = PROCESSES,
) -> list[Point]:
    """Each number of workers under `FEW` streams; with the most of them, each number of streams and of pictures."""
    points: list[Point] = []
    model = (WORK / "llava").absolute()
    untrained.write("llava", model)
    for count in workers:
        config = (WORK / f"crowd-{count}.yaml").absolute()
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(config_of(count, processes))
        with graph("CROWD", "benchmarks.crowd:Frontend", str(config), model) as arm:
            _until_all(arm, count)
            load = Load(arm, count)
            await load.run(FEW, 0, WARM_UP_SECONDS)
            loads = [(FEW, 0)]
            if count == max(workers):
                loads += [(many, 0) for many in streams if many != FEW]
                loads += [(FEW, each) for each in images if each]
            for many, each in loads:
                points.append(await load.run(many, each, seconds))
                print(line_of(points[-1]), file=sys.stderr, flush=True)
    return points


def _until_all(arm: Arm, workers: int) -> None:
    """Waits until the processor knows them. Raises RuntimeError if that does not come."""
    end, said = time.monotonic() + START_SECONDS, ""
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{arm.url}/health", timeout=10) as reply:
            said = reply.read().decode()
            if f'"CrowdWorker":{workers}' in said.replace(" ", ""):
                return
        time.sleep(0.2)
    raise RuntimeError(f"not all of {workers} workers have come: {said[:500]}")


class Load:
    """Clients of one graph."""

    def __init__(self, arm: Arm, workers: int):
        self._arm = arm
        self._workers = workers
        self._pictures = 0

    async def run(self, streams: int, images: int, seconds: float) -> Point:
        """``streams`` clients, each asking again for ``seconds``, every time with ``images`` new pictures."""
        first = PREFILL_SECONDS + (FORWARD_SECONDS + PICTURE_SECONDS if images else 0.0)
        whole = first + (TOKENS - 1) * TOKEN_SECONDS
        turns = math.ceil(seconds / whole)
        bodies = [[self._body(images) for _ in range(turns)] for _ in range(streams)]
        told: list[Told] = []
        before, of_all, began = self._cpu(), _busy_seconds(), time.perf_counter()
        async with session() as client:

            async def stream(own: list[dict[str, Any]]) -> None:
                while own and time.perf_counter() - began < seconds:
                    told.append(await ask(client, self._arm.url, own.pop()))

            await asyncio.gather(*(stream(own) for own in bodies))
        took = time.perf_counter() - began
        cores: dict[str, float] = defaultdict(float)
        busiest = ("", 0.0)
        for process, (name, spent) in self._cpu().items():
            share = (spent - before.get(process, (name, 0.0))[1]) / took
            cores[name] += share
            busiest = max(busiest, (name, share), key=lambda one: one[1])
        good = [one for one in told if not one.failed]
        return Point(
            self._workers,
            streams,
            images,
            len(told),
            sorted({one.failed for one in told if one.failed}),
            len(good) / took,
            streams / whole,
            [one.first - first for one in good],
            [one.whole - whole for one in good],
            dict(cores),
            busiest,
            max(0.0, (_busy_seconds() - of_all) / took - sum(cores.values())),
        )

    def _body(self, images: int) -> dict[str, Any]:
        self._pictures += images
        new = range(self._pictures - images, self._pictures)
        return chat("Say again what stands here, word by word.", [picture(one) for one in new], tokens=TOKENS)

    def _cpu(self) -> dict[int, tuple[str, float]]:
        """pid → (service, CPU seconds)."""
        found = {}
        for process in [*self._arm.processes(), psutil.Process()]:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid] = (_service_of(process), times.user + times.system)
        return found


def _busy_seconds() -> float:
    """CPU seconds of the whole machine since it was started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _service_of(process: psutil.Process) -> str:
    if process == psutil.Process():
        return "the clients"
    words = process.cmdline()
    if "--service-name" in words:
        return words[words.index("--service-name") + 1]
    return "nats-server" if any("nats-server" in word for word in words[:1]) else "dynamo serve"


def wall(points: Sequence[Point]) -> str:
    """The first wall that streams meet, in one sentence."""
    most = max(point.workers for point in points)
    swept = sorted((one for one in points if one.workers == most and not one.images), key=lambda one: one.streams)
    point = next((one for one in swept if one.kept < KEPT), None)
    if point is None:
        return f"No wall up to {swept[-1].streams} streams: {swept[-1].kept:.0%} of what the doubles would allow."
    at = f"{point.streams} streams get {point.kept:.0%} of what the doubles would allow"
    cores, total = machine()["cores"], sum(point.cores.values())
    if point.others > DISTURBED * cores:
        return f"Void: {at}, but others took {point.others:.2f} of {cores} cores meanwhile."
    ordered = sorted(point.cores.items(), key=lambda one: -one[1])
    shares = ", ".join(f"{name} {share / total:.0%}" for name, share in ordered if share > 0.02 * total)
    name, busiest = point.busiest
    if busiest >= FULL:
        return f"The first wall is {name}: at {at}, and one process of it takes {busiest:.2f} cores ({shares})."
    if total >= FULL * cores:
        return f"The first wall is the machine: at {at}, and its {cores} cores are used ({shares})."
    return f"The first wall is none of processor time: at {at}, and {total:.2f} of {cores} cores are used ({shares})."


def line_of(point: Point) -> str:
    """A row of the table."""
    columns = [point.workers, point.streams, point.images, shown(point.requests_a_second), f"{point.kept:.0%}"]
    for values in (point.added_first, point.added_whole):
        columns += [shown(1e3 * percentile(values, share)) for share in (0.5, 0.99)] if values else ["", ""]
    return f"| {' | '.join(map(str, [*columns, f'{sum(point.cores.values()):.2f}']))} |"


def table(points: Sequence[Point]) -> Iterator[str]:
    """The report as lines of Markdown."""
    yield (
        "| workers | streams | images each | requests/s | of allowed | first token: added ms p50 | p99 | "
        "whole answer: added ms p50 | p99 | cores |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    yield from map(line_of, points)
    yield ""
    yield wall(points)
    for failed in sorted({one for point in points for one in point.failed}):
        yield f"FAILED: {failed}"


def plot(points: Sequence[Point], path: Path) -> None:
    """Added latency and requests a second over workers, streams and pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(point.workers for point in points)
    sweeps = {
        "workers": [one for one in points if (one.streams, one.images) == (FEW, 0)],
        "streams": [one for one in points if one.workers == most and not one.images],
        "images": [one for one in points if one.workers == most and one.streams == FEW],
    }
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(13, 7), layout="constrained")
    for column, (name, swept) in enumerate(sweeps.items()):
        swept.sort(key=lambda one, name=name: getattr(one, name))  # type: ignore[misc]
        swept = [one for one in swept if one.added_first]
        x = [getattr(one, name) for one in swept]
        for share in (0.5, 0.99):
            added = [1e3 * percentile(one.added_first, share) for one in swept]
            axes[0][column].plot(x, added, "o-", label=f"p{share * 100:g}")
        axes[1][column].plot(x, [one.requests_a_second for one in swept], "o-", label="measured")
        axes[1][column].plot(x, [one.allowed for one in swept], ":", label="if nothing were added")
        for row, what in enumerate(("added to the first token, ms", "requests a second")):
            axes[row][column].set(xlabel=name, ylabel=what, ylim=(0, None))
            axes[row][column].legend()
            axes[row][column].grid(alpha=0.3)
            if name != "images":
                axes[row][column].set_xscale("log", base=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, FEW, 16, 32, 64, 128, 256])
    parser.add_argument("--images", type=int, nargs="+", default=[0, 1, 2, 4, 8], help="in each question")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="over which the workers are spread")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--record", action="store_true", help="put what is said into benchmarks/README.md")
    parser.add_argument("--output", type=Path, default=WORK / "report")
    options = parser.parse_args(given)
    if (
        min(*options.workers, *options.streams, options.processes, math.ceil(options.seconds)) < 1
        or min(options.images) < 0
    ):
        parser.error("workers, processes, streams and seconds are 1 at least, images 0")
    sweeps = sorted(set(options.workers)), options.streams, options.images
    about, began = machine(), time.monotonic()
    points = asyncio.run(measure(*sweeps, options.seconds, options.processes))
    how = f"{options.seconds:g} s of each load, {(time.monotonic() - began) / 60:.0f} minutes"
    options.output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.scale", *given])
    whole = {
        "command": command,
        "machine": about,
        "wall": wall(points),
        "points": [dataclasses.asdict(point) for point in points],
    }
    (options.output / "scale.json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(points, options.output / "scale.png")
    picture_of_it = "![what is added, and requests a second, over workers, streams and pictures](scale.png)"
    text = "\n".join([headline(command, about, how), "", *table(points), "", picture_of_it, ""])
    print(text, end="")
    if options.record:
        keep("scale", text, [options.output / name for name in ("scale.json", "scale.png")])
    return 1 if any(point.failed for point in points) else 0


if __name__ == "__main__":
    sys.exit(main())
