# SPDX-License-Identifier: Apache-2.0
"""`dynamo top`: its numbers beside the load that was made, as a plain table, as JSON, and in a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd.sdk.control import ControlError
from dynamo_epd.sdk.scaling import SystemPorts
from dynamo_epd.sdk.top import duration, number, seconds, size
from dynamo_epd.sdk.watching import Stage, Watch, quantile, samples_of
from tests.exporters import DoorThatAnswers, Exporters
from tests.questions import chat, data_url, picture, post, user
from tests.serving import Graph, eventually
from tests.toys.calling import door
from tests.toys.running import ROOT, Served, clean_environment

GRAPH = "tests/toys/scaled.py:Front"
SECONDS = 300.0
"""For a busy machine; nothing here is measured by it."""
COLUMNS = 140
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[Served]:
    first = SystemPorts(None).take("the first of three in a row")
    with Served(home, GRAPH, DYN_SYSTEM_PORT=str(first)) as graph:
        graph.wait_for(r"^http://", SECONDS)
        yield graph


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dynamo_epd.sdk.cli", "top", *arguments]


def environment(home: Path) -> dict[str, str]:
    return clean_environment() | {"XDG_STATE_HOME": str(home), "TERM": "xterm-256color"}


def top(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=SECONDS
    )


def test_the_numbers_are_those_of_the_load_between_two_looks(served: Served, home: Path) -> None:
    async def looks() -> tuple[dict[str, Stage], dict[str, Stage], float, float]:
        watch = Watch(door(home))
        before = time.monotonic()
        idle = {stage.name: stage for stage in await watch.look()}
        inner = time.monotonic()
        with ThreadPoolExecutor(3) as clients:
            asked = [asyncio.wrap_future(clients.submit(served.post, "call", {"seconds": 0.3})) for _ in range(6)]
            assert all('"workers"' in answer for answer in await asyncio.gather(*asked))
        inner = time.monotonic() - inner
        loaded = {stage.name: stage for stage in await watch.look()}
        assert watch.url == f"http://127.0.0.1:{served.port}"
        assert watch.reports
        await watch.close()
        return idle, loaded, inner, time.monotonic() - before

    idle, loaded, inner, outer = asyncio.run(looks())
    assert list(loaded) == ["Front", "Calm", "Busy"]
    assert {stage.requests_per_second for stage in idle.values()} == {None}, "there is nothing to compare with yet"
    for name in ("Busy", "Calm"):
        stage = loaded[name]
        assert (stage.ready, stage.wanted, stage.silent, stage.queue_depth) == (1, 1, 0, 0)
        assert stage.requests_per_second is not None
        assert 6 / outer <= stage.requests_per_second <= 6 / inner
    busy, calm = loaded["Busy"], loaded["Calm"]
    assert busy.run_seconds is not None and 0.3 <= busy.run_seconds < outer
    assert busy.wait_p50 is not None and busy.wait_p99 is not None
    assert 0 <= busy.wait_p50 <= busy.wait_p99 < outer
    assert calm.run_seconds is not None and calm.run_seconds < busy.run_seconds
    assert loaded["Front"].requests_per_second is None, "it reports no stage"
    assert all(stage.memory_bytes > 10 * 2**20 for stage in loaded.values())


def test_once_is_a_plain_table(served: Served, home: Path) -> None:
    ran = top(home, GRAPH, "--once", "--interval", "0.5")
    assert (ran.returncode, ran.stderr) == (0, "")
    head, _, columns, *rows = [line.rstrip() for line in ran.stdout.splitlines()]
    assert re.fullmatch(rf"{re.escape(GRAPH)} · up .+ s · http://127\.0\.0\.1:{served.port}", head)
    assert columns.split()[:3] == ["stage", "ready", "queue"] and columns.split()[-1] == "memory"
    assert [row.split()[:2] for row in rows] == [["Front", "1/1"], ["Calm", "1/1"], ["Busy", "1/1"]]
    assert "\x1b" not in ran.stdout
    assert "NIXL" not in columns, "no stage of this graph has hand-offs"


class Terminal:
    """A command in a pseudo-terminal of its own. ``seen``: what it wrote."""

    def __init__(self, home: Path, *arguments: str):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=environment(home),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is its own
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, pattern: str) -> None:
        """Until ``pattern`` is in what comes from now on, without colours and cursor movements."""
        end, text = time.monotonic() + SECONDS, ""
        while not re.search(pattern, plain := CONTROL.sub("", text)):
            assert time.monotonic() < end, f"no {pattern!r} in {plain!r}"
            text += self._read()

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def end(self) -> int:
        """The exit status, once all was read."""
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            self._read()
        status = self.process.wait(0)
        while self._read():
            pass
        return status

    def _read(self) -> str:
        if not select.select([self._ours], [], [], 0.1)[0]:
            return ""
        try:
            text = os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""
        self.seen += text
        return text

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_in_a_terminal_it_is_refreshed_and_shows_a_worker_that_is_killed_and_returns(
    served: Served, home: Path
) -> None:
    with Terminal(home, "--interval", "0.2") as terminal:
        terminal.wait_for(r"Busy +1/1")
        os.kill(served.workers("Busy")[0], signal.SIGKILL)
        terminal.wait_for(r"Busy +0/1")
        terminal.wait_for(r"Busy +1/1")
        served.post("call", {"seconds": 0.01})
        terminal.wait_for(r"wait p50 p99")  # the column is there once there is something for it
        terminal.press(b"\x03")
        assert terminal.end() == 0
    assert terminal.seen.startswith("\x1b[?1049h") and terminal.seen.rindex("\x1b[?1049l") > terminal.seen.rindex(
        "Busy"
    )
    assert terminal.seen.rindex("\x1b[?25h") > terminal.seen.rindex("\x1b[?25l"), "the cursor is back"
    assert "Traceback" not in terminal.seen and "Error" not in terminal.seen
    assert served.process.poll() is None


def test_json_is_for_scripts(served: Served, home: Path) -> None:
    ran = top(home, f"./{GRAPH}", "--json", "--interval", "0.2")
    assert (ran.returncode, ran.stderr) == (0, "")
    said = json.loads(ran.stdout)
    assert (said["graph"], said["pid"], said["interval"]) == (GRAPH, served.process.pid, 0.2)
    assert 0 < said["uptime_seconds"] < 24 * 3600
    assert {stage["name"]: stage["ready"] for stage in said["stages"]} == {"Front": 1, "Calm": 1, "Busy": 1}


STAGES = {"Frontend", "Processor", "ImageWorker", "EmbedWorker", "EncodeWorker", "PrefillWorker", "DecodeWorker"}


def test_every_stage_of_a_real_graph_has_its_numbers(seeing: Graph) -> None:
    """Under load from one client: what is told is of one interval, and no client knows when that begins."""
    again = user("What is in it? Answer in one sentence.", data_url(picture(990_000)))
    over = threading.Event()

    def load() -> None:
        for turn in itertools.count():
            if over.is_set():
                return
            fresh = {"prompt": "a large red star on a blue background", "seed": 990_000 + turn}
            post(f"{seeing.url}/v1/validations", fresh, timeout=SECONDS)
            post(f"{seeing.url}/v1/chat/completions", chat(again), timeout=SECONDS)

    def whole() -> dict[str, Any] | None:
        if asked.done():
            asked.result()
        ran = top(seeing.state, "graphs.cova:Frontend", "--json", "--interval", "5")
        assert (ran.returncode, ran.stderr) == (0, "")
        stages = {stage["name"]: stage for stage in json.loads(ran.stdout)["stages"]}
        found = [stages["EncodeWorker"]["cache_hit_rate"], stages["ImageWorker"]["output_per_second"]]
        found += [stages[name]["nixl_bytes_per_second"] for name in ("EncodeWorker", "PrefillWorker")]
        return stages if all(found) else None

    with ThreadPoolExecutor(1) as client:
        asked = client.submit(load)
        try:
            stages = eventually(whole, "cache hits, pictures and bytes over NIXL in one interval", SECONDS)
        finally:
            over.set()
        asked.result()
    counts = {name: (stage["ready"], stage["wanted"], stage["silent"]) for name, stage in stages.items()}
    assert counts == dict.fromkeys(STAGES, (1, 1, 0))
    assert 0 < stages["EncodeWorker"]["cache_hit_rate"] <= 1
    assert (stages["ImageWorker"]["output"], stages["EmbedWorker"]["output"]) == ("images", "texts")
    rates = [stages["EncodeWorker"]["nixl_bytes_per_second"], stages["PrefillWorker"]["nixl_bytes_per_second"]]
    assert min(stages["ImageWorker"]["output_per_second"], *rates) > 0
    assert all(stage["memory_bytes"] > 10 * 2**20 for stage in stages.values())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "error: no graph runs for this user; running: none\n"),
        ((GRAPH,), 2, f"error: no graph {GRAPH} runs for this user; running: none\n"),
        (("--interval", "0"), 2, "error: --interval must be from 0.2 to 60 seconds\n"),
        ((GRAPH, "--Busy.fail-from=1"), 2, "error: --Busy.fail-from: watching takes no configuration\n"),
    ],
)
def test_what_cannot_be_shown_is_one_clear_line(
    tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    ran = top(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", message)


METRICS = """# TYPE epd_requests counter
epd_requests_total{{status="200"}} {good}
epd_requests_total{{status="499"}} 5.0
epd_requests_total{{status="503"}} {bad}
# TYPE epd_stage_queue_seconds histogram
epd_stage_queue_seconds_bucket{{le="0.1"}} {images}
epd_stage_queue_seconds_bucket{{le="+Inf"}} {images}
epd_stage_queue_seconds_count {images}
epd_stage_queue_seconds_sum 0.0
# TYPE epd_images_generated counter
epd_images_generated_total{{model="m"}} {images}
# TYPE epd_embedding_cache_hits counter
epd_embedding_cache_hits_total {hits}
# TYPE epd_embedding_cache_misses counter
epd_embedding_cache_misses_total {misses}
# TYPE nixl_transfer_bytes counter
nixl_transfer_bytes_total {nixl}
# TYPE epd_digest_failures counter
epd_digest_failures_total {broken}
# TYPE epd_job_queue_depth gauge
epd_job_queue_depth {jobs}
"""


def test_counters_of_workers_that_restart_come_late_or_fall_silent_are_counted_once(
    exporters: Exporters, tmp_path: Path
) -> None:
    double = DoorThatAnswers()

    def says(name: str, **values: int) -> None:
        zero = dict.fromkeys(("good", "bad", "images", "hits", "misses", "nixl", "broken", "jobs"), 0)
        exporters.texts[f"/{name}"] = METRICS.format(**zero | values)

    def worker(index: int, pid: int, *, ready: bool = True, leaving: bool = False) -> dict[str, Any]:
        metrics = exporters.worker(str(index)).metrics
        return {"index": index, "ready": ready, "leaving": leaving, "metrics": metrics, "url": None, "pid": pid}

    gone = 2**22 + 1
    """Above the largest process id: as one that ends while it is looked at."""

    async def watch() -> list[Stage]:
        found = []
        async with double.open(tmp_path / "control") as path:
            watch = Watch(path)

            async def look(*workers: dict[str, Any]) -> None:
                double.services = {"Image": list(workers)}
                found.extend(await watch.look())

            says("0", good=100, bad=2, images=50, hits=10, misses=30, nixl=1000, broken=1)
            says("1", good=7, images=7, jobs=5)
            exporters.texts["/1"], late = None, exporters.texts["/1"]  # too long an answer: none
            await look(worker(0, gone), worker(1, gone + 1))
            exporters.texts["/1"] = late
            says("0", good=110, bad=3, images=70, hits=13, misses=31, nixl=3000, broken=1, jobs=4)
            await look(worker(0, gone), worker(1, gone + 1))
            says("0", good=4, bad=0, images=20, hits=1, misses=3, nixl=2000)  # another process
            await look(worker(0, gone + 2), worker(1, gone + 1), worker(2, gone + 3, ready=False))
            says("2", good=3, images=20, nixl=2000)  # it has come up since
            says("1", good=8, images=7)
            await look(worker(0, gone + 2), worker(1, gone + 1, ready=False, leaving=True), worker(2, gone + 3))
            await watch.close()
        with pytest.raises(ControlError):
            await watch.look()
        return found

    first, second, third, fourth = asyncio.run(watch())
    assert (first.ready, first.wanted, first.silent, first.failures) == (2, 2, 1, 3)
    assert (first.requests_per_second, first.cache_hit_rate, first.nixl_bytes_per_second) == (None, None, None)
    assert (second.silent, second.failures, second.cache_hit_rate, second.output) == (0, 4, 0.75, "images")
    assert (first.job_queue_depth, second.job_queue_depth) == (0, 5), "of one queue, of which each tells"
    assert (first.wait_p99, second.wait_p50, second.wait_p99) == (None, pytest.approx(0.05), pytest.approx(0.099))

    def each(stage: Stage, scale: float) -> tuple[float, float]:
        """Requests and pictures for each ``scale`` bytes over NIXL, so that no clock is in it."""
        assert stage.requests_per_second is not None and stage.output_per_second is not None
        assert stage.nixl_bytes_per_second
        unit = scale / stage.nixl_bytes_per_second
        return stage.requests_per_second * unit, stage.output_per_second * unit

    assert each(second, 2000) == pytest.approx((11, 20)), "what the late one did before it was first read is not news"
    assert each(third, 2000) == pytest.approx((4 + 5, 20)), "a new process counts from zero"
    assert (third.ready, third.wanted, third.failures, third.cache_hit_rate) == (2, 3, 4, 0.25)
    assert each(fourth, 2000) == pytest.approx((3 + 5 + 1, 20))
    assert (fourth.ready, fourth.wanted, fourth.failures, fourth.cache_hit_rate) == (2, 2, 4, None)
    assert fourth.memory_bytes == 0


@pytest.mark.parametrize(
    ("share", "buckets", "value"),
    [
        (0.5, [], None),
        (0.5, [(1.0, 0.0), (float("inf"), 0.0)], None),
        (0.5, [(1.0, 10.0), (float("inf"), 10.0)], 0.5),
        (0.5, [(1.0, 0.0), (2.0, 4.0), (float("inf"), 4.0)], 1.5),
        (0.99, [(1.0, 50.0), (2.0, 50.0), (4.0, 100.0), (float("inf"), 100.0)], 3.96),
        (0.99, [(1.0, 1.0), (2.0, 1.0), (float("inf"), 4.0)], 2.0),
    ],
)
def test_quantiles_are_prometheus_own(share: float, buckets: list[tuple[float, float]], value: float | None) -> None:
    assert quantile(share, buckets) == (None if value is None else pytest.approx(value))


def test_what_is_no_metrics_is_none() -> None:
    assert samples_of(b"<html>not found</html>") is None
    assert samples_of(b"\xff\xfe") is None
    assert samples_of(b'a_bucket{le="0.1",m="x"} 1\na_bucket{le="0.1",m="y"} 2\n') == {("a_bucket", "0.1"): 3.0}


def test_numbers_are_short() -> None:
    assert [number(one) for one in (None, 0.0, 0.12345, 7.0, 12.345, 1234.5)] == [
        "-",
        "0",
        "0.123",
        "7",
        "12.3",
        "1234",
    ]
    assert [seconds(one) for one in (None, 0.0, 0.0123, 0.9996, 61.25)] == ["-", "0 ms", "12 ms", "1.0 s", "61.2 s"]
    assert [size(one) for one in (None, 0, 1536, 5 * 2**20, 3 * 2**31)] == ["-", "0 B", "2 KiB", "5 MiB", "6.0 GiB"]
    assert [duration(one) for one in (5.9, 65, 7265)] == ["5 s", "1 min 5 s", "2 h 1 min"]
