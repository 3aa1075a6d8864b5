# SPDX-License-Identifier: Apache-2.0
"""Metrics of workers that come, go and restart, over real HTTP, as sums that never fall."""

from __future__ import annotations

import asyncio

from dynamo_epd.planning.doors import Staffed, Worker
from dynamo_epd.planning.observing import Observer, stage_samples
from dynamo_epd.planning.policy import SETTLE, Decision, Limits, Observed, State, decide
from tests.exporters import Exporters

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


JOBS = """epd_job_queue_seconds_bucket{{dynamo_component="A",le="1.0"}} 0.0
epd_job_queue_seconds_count{{dynamo_component="A"}} {count}
epd_job_queue_seconds_sum{{dynamo_component="A"}} {seconds}
"""


def says(exporters: Exporters, worker: str, depth: float, count: float, seconds: float) -> None:
    exporters.texts[f"/{worker}"] = TEXT.format(depth=depth, count=count, seconds=seconds)


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


def test_the_time_that_jobs_lay_in_the_queue_is_the_stages_wait() -> None:
    alone = TEXT.format(depth=2.0, count=4.0, seconds=0.25)
    without = stage_samples(alone.encode())
    found = stage_samples((alone + JOBS.format(count=3.0, seconds=90.0)).encode())
    assert without is not None
    assert found == without | {"queue_seconds_sum": 90.015}, "but no more waits than there were visits"


WAITING = 'epd_job_queue_depth{{dynamo_component="A"}} {jobs}\n'


def test_jobs_that_no_worker_has_taken_are_counted_once_however_many_tell_of_them(exporters: Exporters) -> None:
    def tell(worker: str, jobs: float) -> None:
        says(exporters, worker, 1, 10, 5)
        exporters.texts[f"/{worker}"] = f"{exporters.texts[f'/{worker}']}{WAITING.format(jobs=jobs)}"

    async def looks() -> list[Observed]:
        observer, found = Observer(), []
        tell("a", 40.0)
        tell("b", 39.0)
        says(exporters, "c", 1, 10, 5)  # it cannot tell
        everybody = [exporters.worker(name) for name in "abc"]
        found.append((await observer.look({"A": Staffed(3, tuple(everybody))}))["A"])
        gone = Worker("a", False, "http://127.0.0.1:1/metrics")
        found.append((await observer.look({"A": Staffed(3, (gone, *everybody[1:]))}))["A"])
        found.append((await observer.look({"A": Staffed(1, (everybody[2],))}))["A"])
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.jobs for one in found] == [40, 39, 0]
    assert [one.in_stage for one in found] == [3, 2, 1], "they are no visits yet"
    assert found[0].arrived == 33


def test_jobs_that_lie_in_the_queue_make_a_stage_grow_although_its_workers_look_idle(exporters: Exporters) -> None:
    """A worker takes one at a time: its load is 1 of its 4, however many there are."""

    async def looks(lain: float) -> list[tuple[int, Decision | None]]:
        observer, state, found = Observer(), State(), []
        for second in range(61):
            says(exporters, "a", 1, second, second)
            exporters.texts["/a"] = f"{exporters.texts['/a']}{JOBS.format(count=second, seconds=second * lain)}"
            seen = (await observer.look({"A": Staffed(1, (exporters.worker("a"),))}))["A"]
            state, decision = decide(state, seen, float(second), Limits(concurrency=4))
            found.append((second, decision))
        await observer.close()
        return found

    assert [one for one in asyncio.run(looks(0.1)) if one[1]] == []
    second, first = next(one for one in asyncio.run(looks(120.0)) if one[1])
    assert first is not None
    assert (first.replicas, first.reason, second) == (2, "requests wait 120.00 s, target 0.5 s", SETTLE)


def test_workers_add_up_and_sums_outlive_restarts_and_departures(exporters: Exporters) -> None:
    async def looks() -> list[Observed]:
        observer = Observer()
        found = []

        async def look(replicas: int, *names: str) -> None:
            workers = tuple(exporters.worker(name) for name in names)
            found.append((await observer.look({"A": Staffed(replicas, workers)}))["A"])

        says(exporters, "a", 2, 10, 5)
        says(exporters, "b", 1, 6, 3)
        await look(2, "a", "b")
        says(exporters, "b", 0, 2, 1)  # started again: it counts from zero
        await look(2, "a", "b")
        says(exporters, "a", 0, 11, 6)
        await look(1, "a", "b")  # b drains, and finishes one more
        says(exporters, "b", 0, 3, 2)
        await look(1, "a", "b")
        await look(1, "a")
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.finished for one in found] == [16, 18, 19, 20, 20]
    assert [one.run_seconds for one in found] == [8, 9, 10, 11, 11]
    assert [one.in_stage for one in found] == [3, 2, 0, 0, 0]
    assert [(one.replicas, one.ready) for one in found] == [(2, 2), (2, 2), (1, 1), (1, 1), (1, 1)]


def test_what_a_worker_did_before_it_was_first_read_is_news_only_of_a_new_one(exporters: Exporters) -> None:
    """As when a planner is started again over a busy graph."""

    async def looks() -> list[Observed]:
        observer = Observer()
        found = []

        async def look(*names: str, unready: str = "") -> None:
            workers = tuple(exporters.worker(name, ready=name != unready) for name in names)
            found.append((await observer.look({"A": Staffed(len(workers), workers)}))["A"])

        says(exporters, "a", 2, 10, 5)
        says(exporters, "b", 16, 10_000, 5_000)
        exporters.texts["/b"], late = None, exporters.texts["/b"]  # too long an answer: none
        await look("a", "b")
        await look("a", "b", unready="b")
        exporters.texts["/b"] = late
        await look("a", "b")
        says(exporters, "b", 14, 10_003, 5_001)
        await look("a", "b", "c", unready="c")
        says(exporters, "c", 1, 4, 2)  # it has come up since
        await look("a", "b", "c")
        says(exporters, "d", 3, 5, 2)  # it was not there before
        await look("a", "b", "c", "d")
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.finished for one in found] == [10, 10, 10, 13, 17, 22]
    assert [one.run_seconds for one in found] == [5, 5, 5, 6, 8, 10]
    assert [one.queued for one in found] == [10, 10, 10, 13, 17, 22]
    assert [one.in_stage for one in found] == [2, 2, 18, 16, 17, 20]
    assert [one.arrived for one in found] == [12, 12, 12, 13, 18, 26], "what it had is no burst"


def test_what_a_dead_worker_had_to_do_is_no_longer_in_the_stage(exporters: Exporters) -> None:
    """Through all its starts: workers would be kept, and more asked for, for requests that nobody has."""

    async def looks() -> list[Observed]:
        observer = Observer()
        found = []

        async def look(b: Worker) -> None:
            found.append((await observer.look({"A": Staffed(2, (exporters.worker("a"), b))}))["A"])

        says(exporters, "a", 2, 10, 5)
        says(exporters, "b", 30, 6, 3)
        await look(exporters.worker("b"))
        for ready in (False, False, True):  # it is started again, and up before it is first read
            await look(Worker("b", ready, "http://127.0.0.1:1/metrics"))
        says(exporters, "b", 1, 0, 0)
        await look(exporters.worker("b"))
        says(exporters, "b", 0, 1, 1)
        await look(exporters.worker("b", ready=False))  # it drains, and says so
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.in_stage for one in found] == [32, 2, 2, 2, 3, 2]
    assert [one.finished for one in found] == [16, 16, 16, 16, 16, 17], "what it had finished, it had"
    assert [one.arrived for one in found] == [48, 18, 18, 18, 19, 19]


def test_a_worker_that_was_only_silent_for_a_while_is_no_burst_when_it_is_back(exporters: Exporters) -> None:
    async def looks() -> list[Observed]:
        observer = Observer()
        found = []
        says(exporters, "b", 30, 6, 3)
        for worker in (exporters.worker("b"), Worker("b", False, "http://127.0.0.1:1/metrics"), exporters.worker("b")):
            found.append((await observer.look({"A": Staffed(1, (worker,))}))["A"])
            says(exporters, "b", 28, 9, 5)
        await observer.close()
        return found

    found = asyncio.run(looks())
    assert [one.in_stage for one in found] == [30, 0, 28]
    # three have ended and one has come; the 30 left out meanwhile do not come a second time
    assert [one.arrived for one in found] == [36, 6, 7]


def test_who_does_not_answer_counts_with_what_it_said_last_and_who_reports_no_stage_not_at_all(
    exporters: Exporters,
) -> None:
    async def looks() -> list[dict[str, Observed]]:
        observer = Observer()
        says(exporters, "a", 2, 10, 5)
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
