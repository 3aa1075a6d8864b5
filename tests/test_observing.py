# SPDX-License-Identifier: Apache-2.0
"""Metrics of workers that come, go and restart, over real HTTP, as sums that never fall."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dynamo_epd.planning.doors import Staffed, Worker
from dynamo_epd.planning.observing import SCRAPE_BYTES, Observer, stage_samples
from dynamo_epd.planning.policy import Observed

TEXT = """# HELP epd_stage_queue_depth Requests that wait or run in this stage
epd_stage_queue_depth{{dynamo_component="A",model="a {{}} b"}} {depth}
epd_stage_run_seconds_bucket{{dynamo_component="A",le="0.1"}} 3.0
epd_stage_run_seconds_count{{dynamo_component="A"}} {count}
epd_stage_run_seconds_sum{{dynamo_component="A"}} {seconds}
epd_stage_queue_seconds_count{{dynamo_component="A"}} {count}
epd_stage_queue_seconds_sum{{dynamo_component="A"}} 1.5e-02
epd_stage_queue_seconds_created{{dynamo_component="A"}} 1.7e+09
vllm:request_success_total 12
"""


class Exporters:
    """One server; a path per worker. ``texts``: path → what it says, or bytes that never end for None."""

    def __init__(self) -> None:
        self.texts: dict[str, str | None] = {}
        exporters = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = exporters.texts.get(self.path, "")
                self.send_response(200)
                self.end_headers()
                try:
                    if text is None:
                        for _ in range(2 * SCRAPE_BYTES // 65536):
                            self.wfile.write(b"#" * 65536)
                    else:
                        self.wfile.write(text.encode())
                except OSError:
                    return  # the observer has had enough

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def says(self, path: str, depth: float, count: float, seconds: float) -> None:
        self.texts[path] = TEXT.format(depth=depth, count=count, seconds=seconds)

    def worker(self, name: str, ready: bool = True) -> Worker:
        return Worker(name, ready, f"http://127.0.0.1:{self.server.server_address[1]}/{name}")


@pytest.fixture
def exporters() -> Iterator[Exporters]:
    found = Exporters()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_stages_samples_are_found_among_others() -> None:
    found = stage_samples(TEXT.format(depth=2.0, count=4.0, seconds=0.25).encode())
    assert found == {
        "queue_depth": 2.0,
        "run_seconds_count": 4.0,
        "run_seconds_sum": 0.25,
        "queue_seconds_count": 4.0,
        "queue_seconds_sum": 0.015,
    }
    assert stage_samples(b"vllm:request_success_total 12\nepd_stage_queue_depth 1\n") is None


def test_workers_add_up_and_sums_outlive_restarts_and_departures(exporters: Exporters) -> None:
    async def looks() -> list[Observed]:
        observer = Observer()
        found = []

        async def look(replicas: int, *names: str) -> None:
            workers = tuple(exporters.worker(name) for name in names)
            found.append((await observer.look({"A": Staffed(replicas, workers)}))["A"])

        exporters.says("/a", 2, 10, 5)
        exporters.says("/b", 1, 6, 3)
        await look(2, "a", "b")
        exporters.says("/b", 0, 2, 1)  # started again: it counts from zero
        await look(2, "a", "b")
        exporters.says("/a", 0, 11, 6)
        await look(1, "a", "b")  # b drains, and finishes one more
        exporters.says("/b", 0, 3, 2)
        await look(1, "a", "b")
        await look(1, "a")
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.finished for one in found] == [16, 18, 19, 20, 20]
    assert [one.run_seconds for one in found] == [8, 9, 10, 11, 11]
    assert [one.in_stage for one in found] == [3, 2, 0, 0, 0]
    assert [(one.replicas, one.ready) for one in found] == [(2, 2), (2, 2), (1, 1), (1, 1), (1, 1)]


def test_who_does_not_answer_counts_with_what_it_said_last_and_who_reports_no_stage_not_at_all(
    exporters: Exporters,
) -> None:
    async def looks() -> list[dict[str, Observed]]:
        observer = Observer()
        exporters.says("/a", 2, 10, 5)
        exporters.texts["/front"] = "epd_requests_total 3\n"
        services = {
            "A": Staffed(2, (exporters.worker("a"), Worker("starts", False, None))),
            "Front": Staffed(1, (exporters.worker("front"),)),
            "Gone": Staffed(1, (Worker("gone", True, "http://127.0.0.1:1/metrics"),)),
        }
        first = await observer.look(services)
        exporters.texts["/a"] = None  # far more than a worker's metrics are
        second = await observer.look(services)
        await observer.close()
        return [first, second]

    first, second = asyncio.run(looks())
    assert first.keys() == {"A"}
    assert (first["A"].replicas, first["A"].ready, first["A"].in_stage) == (2, 1, 2)
    assert second == first
