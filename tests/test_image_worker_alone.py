# SPDX-License-Identifier: Apache-2.0
"""An image worker without a graph: what it refuses and counts, a T5 that does not answer it, how it leaves, and jobs
whose pictures find no room on the disk."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from components.image_worker import ImageConfig, ImageWorker
from components.protocol import GenerateRequest, ModelNames
from dynamo_epd.diffusion.text_encoder import Row
from dynamo_epd.errors import InvalidRequest, NotFound, Overloaded, StageUnavailable
from dynamo_epd.failures import IN_A_ROW, Failures, Hung
from dynamo_epd.metrics import StageMetrics
from dynamo_epd.planning.observing import stage_samples
from dynamo_epd.sdk.service import info_of
from dynamo_epd.store import Store, StoreConfig, new_id
from tests.fake_clock import FakeClock
from tests.small_disk import enlarge, small_disk
from tests.test_jobs import PATIENT, QUICK, Server, nothing, over, queue, submitted

BOUND = 60.0
SIDE = 320
"""Of a picture of noise: its PNG has 300 KB, and three of them fit into `DISK`."""
DISK, FIT, PICTURES = "1m", 3, 6


class SilentEmbedWorker:
    """A double that takes what it is asked, and never answers."""

    def __init__(self) -> None:
        self.asked = 0
        self.left = threading.Event()

    def states(self, request: Any) -> SilentEmbedWorker:
        self.asked += 1
        return self

    async def only(self) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


class FakeGenerator:
    """A double that draws noise, ``queue_seconds`` after it was asked."""

    def __init__(self, queue_seconds: float = 0.0) -> None:
        self.made = 0
        self.queue_seconds = queue_seconds

    def check(self, wanted: Any) -> None:
        raise InvalidRequest("there is no such adapter", param="lora")

    def generate(self, wanted: Any, on_step: Any, stop: threading.Event, on_begin: Callable[[], None]) -> Any:
        time.sleep(self.queue_seconds)
        on_begin()
        self.made += 1
        pixels = np.random.default_rng(self.made).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        return SimpleNamespace(pixels=pixels, prompt_tokens=1, image_tokens=1, prompt_vector=None)


class FakeMetrics:
    """A double that remembers what the last visit says of its wait."""

    waited = 0.0

    @contextmanager
    def visit(self) -> Iterator[Any]:
        yield self

    def inc(self) -> None:
        """Nothing."""


class BrokenGenerator:
    """A double that begins when it has a turn, and fails once ``together`` of its pictures are under way."""

    def __init__(self, together: int) -> None:
        self.turns = threading.Semaphore(0)
        self.under_way = threading.Barrier(together)

    def generate(self, wanted: Any, on_step: Any, stop: threading.Event, on_begin: Callable[[], None]) -> Any:
        assert self.turns.acquire(timeout=BOUND)
        on_begin()
        self.under_way.wait(BOUND)
        raise RuntimeError("out of memory")


def image_worker(config: ImageConfig, **made_at_start: Any) -> ImageWorker:
    """One that was constructed, and given what its start hook would have made."""
    worker = object.__new__(ImageWorker)
    names = ModelNames.of(config.served_model_name, config.model)
    vars(worker).update(
        config=config, names=names, name=names.names[0], waiting=0, failures=Failures(config.engine_silence)
    )
    vars(worker).update(loop=asyncio.get_running_loop(), **made_at_start)
    return worker


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * BOUND):
            await scenario()

    asyncio.run(bounded())


def test_a_t5_that_does_not_answer_is_a_stage_that_is_missing() -> None:
    """Its pictures are refused as of a stage that is not there, jobs wait for it, and what was asked is called off."""

    async def scenario() -> None:
        silent = SilentEmbedWorker()
        worker = image_worker(ImageConfig("tiny-image", lease_seconds=0.2), __dynamo_clients__={"embed_worker": silent})
        with pytest.raises(StageUnavailable, match="the EmbedWorker does not answer in time"):
            await asyncio.to_thread(worker._condition, Row((1, 2, 3), 2, masked=True))
        assert await asyncio.to_thread(silent.left.wait, BOUND), "the question is still open"
        assert silent.asked == 1

    run(scenario)


REQUEST = GenerateRequest("r", "a red star", 1)
WANTED = SimpleNamespace(width=SIDE, height=SIDE, steps=1)


def test_one_picture_more_than_may_wait_is_refused() -> None:
    async def scenario() -> None:
        worker = image_worker(ImageConfig("tiny-image", max_waiting=2))
        vars(worker).update(waiting=2, _wanted=lambda _: WANTED)
        with pytest.raises(Overloaded, match="2 pictures wait already"):
            await anext(worker.generate(REQUEST))

    run(scenario)


def test_the_wait_for_a_turn_is_no_work_whoever_waits(tmp_path: Path) -> None:
    """Not only the wait for a thread: there may be more threads than pictures that can be made at once."""

    async def scenario() -> None:
        metrics = FakeMetrics()
        with ThreadPoolExecutor(1) as threads:
            worker = image_worker(
                ImageConfig("tiny-image"), store=Store(StoreConfig(url=str(tmp_path))), generator=FakeGenerator(0.3),
                metrics=metrics, images=metrics, threads=threads,
            )  # fmt: skip
            request = msgspec.structs.replace(REQUEST, keep=new_id())
            replies = [reply async for reply in worker._generated(WANTED, request)]  # type: ignore[arg-type]
        assert replies[-1].done is not None
        assert replies[-1].done.queue_seconds >= 0.3
        assert metrics.waited >= 0.3

    run(scenario)


AT_ONCE = 8


@pytest.mark.parametrize("together", [1, AT_ONCE])
def test_pictures_that_fail_together_are_no_reason_to_end(together: int) -> None:
    """Those that fail one after another are, though all of them were asked for at once and waited for their turns."""

    async def scenario() -> None:
        metrics, generator = FakeMetrics(), BrokenGenerator(together)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            worker = image_worker(ImageConfig("tiny-image"), generator=generator, metrics=metrics, threads=threads)
            asked = [
                asyncio.ensure_future(anext(worker._generated(WANTED, REQUEST)))  # type: ignore[arg-type]
                for _ in range(AT_ONCE)
            ]
            until = asyncio.FIRST_COMPLETED if together == 1 else asyncio.ALL_COMPLETED
            lived = []
            for _ in range(AT_ONCE // together):
                generator.turns.release(together)
                failed, waiting = await asyncio.wait(asked, return_when=until)
                assert {type(one.exception()) for one in failed} == {RuntimeError}
                asked = [*waiting]
                lived.append(worker.alive())
        assert lived == ([True] if together > 1 else [turn < IN_A_ROW for turn in range(1, AT_ONCE + 1)])

    run(scenario)


class HangingGenerator:
    """A double whose denoise steps take ``SILENCE`` each by ``clock``; in the last it hangs until it is let go."""

    def __init__(self, clock: FakeClock, steps: int) -> None:
        self.clock, self.steps, self.let_go = clock, steps, threading.Event()

    def generate(self, wanted: Any, on_step: Any, stop: threading.Event, on_begin: Callable[[], None]) -> Any:
        on_begin()
        for step in range(1, self.steps):
            self.clock.now += SILENCE
            on_step(step, self.steps, None)
        assert self.let_go.wait(BOUND)
        raise RuntimeError("the picture is not wanted any more")


SILENCE = 60.0


def test_a_picture_that_hangs_is_known_although_its_client_has_left(clock: FakeClock) -> None:
    """And not while its steps are taken, however long all of them take."""

    async def scenario() -> None:
        generator = HangingGenerator(clock, steps=8)
        with ThreadPoolExecutor(1) as threads:
            worker = image_worker(
                ImageConfig("tiny-image", engine_silence=SILENCE), generator=generator, metrics=FakeMetrics(),
                threads=threads, steps=SimpleNamespace(observe=lambda seconds: None),
            )  # fmt: skip
            async with aclosing(worker._generated(WANTED, REQUEST)) as events:  # type: ignore[arg-type]
                async for event in events:
                    if event.step == generator.steps - 1:
                        break
            assert worker.alive(), "its last step has just begun"
            clock.now += SILENCE + 1
            with pytest.raises(Hung):
                worker.alive()
            generator.let_go.set()
        assert worker.alive()

    run(scenario)


class GatedGenerator(FakeGenerator):
    """A double that holds each picture until it is let go. ``took``: when it was begun and when it was let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let_go = threading.Semaphore(0), threading.Semaphore(0)
        self.took: list[tuple[float, float]] = []

    def generate(self, *arguments: Any) -> Any:
        begun = time.time()
        self.begun.release()
        assert self.let_go.acquire(timeout=BOUND)
        self.took.append((begun, time.time()))
        return super().generate(*arguments)


JOBS = 5


def test_the_time_that_jobs_lie_in_the_queue_counts_once_for_each(server: Any, tmp_path: Path) -> None:
    """Each lies from its submission until the one before has ended: the planner is told of a wait no shorter than
    that, and of none that is longer than until its picture is begun."""

    async def scenario() -> None:
        registry = CollectorRegistry()
        depth, queued, ran, lain = (
            Gauge("epd_stage_queue_depth", "", registry=registry),
            *(
                Histogram(f"epd_{name}_seconds", "", registry=registry)
                for name in ("stage_queue", "stage_run", "job_queue")
            ),
        )
        generator, store = GatedGenerator(), Store(StoreConfig(url=str(tmp_path / "store")))
        with ThreadPoolExecutor(1) as threads:
            worker = image_worker(
                ImageConfig("tiny-image"), store=store, generator=generator, job_queue=lain, images=FakeMetrics(),
                metrics=StageMetrics(depth, queued, ran), threads=threads, _wanted=lambda request: WANTED,
            )  # fmt: skip
            async with queue(server) as front, queue(server) as working:
                jobs, came = [], []
                for number in range(JOBS):
                    jobs.append(await submitted(front, str(number)))
                    came.append(time.time())
                working.work(worker._job)
                for _ in jobs:
                    assert await asyncio.to_thread(generator.begun.acquire, timeout=BOUND)
                    generator.let_go.release()
                for job in jobs:
                    assert (await over(front, job.id)).status == "completed"
        samples = stage_samples(generate_latest(registry))
        assert samples is not None
        assert (samples["queue_seconds_count"], samples["run_seconds_count"]) == (JOBS, JOBS)
        least = sum(end - there for there, (_, end) in zip(came[1:], generator.took, strict=False))
        most = sum(begun - job.created for job, (begun, _) in zip(jobs, generator.took, strict=True))
        lay = registry.get_sample_value("epd_job_queue_seconds_sum")
        waited = registry.get_sample_value("epd_stage_queue_seconds_sum")
        assert lay is not None and waited is not None
        assert least < lay <= most
        assert samples["queue_seconds_sum"] == pytest.approx(lay + waited)

    run(scenario)


class StoreThatIsAwayOnce(Store):
    """A double in one thing: whoever asks first for ``what`` does not reach it."""

    def __init__(self, config: StoreConfig, what: str):
        super().__init__(config)
        self.asked = 0
        reached = getattr(self, what)

        async def asked(*arguments: Any) -> Any:
            self.asked += 1
            if self.asked == 1:
                raise StageUnavailable("the object store cannot be reached")
            return await reached(*arguments)

        setattr(self, what, asked)


@pytest.mark.parametrize("what", ["head", "put"])
def test_the_time_in_the_queue_counts_though_the_store_was_away(server: Any, tmp_path: Path, what: str) -> None:
    """Once: when the job's first picture is there, and none of it is lost."""

    async def scenario() -> None:
        store, lain = StoreThatIsAwayOnce(StoreConfig(url=str(tmp_path / "store")), what), list[float]()
        metrics = FakeMetrics()
        with ThreadPoolExecutor(1) as threads:
            worker = image_worker(
                ImageConfig("tiny-image"), store=store, generator=FakeGenerator(), metrics=metrics, images=metrics,
                threads=threads, _wanted=lambda request: WANTED, job_queue=SimpleNamespace(observe=lain.append),
            )  # fmt: skip
            async with queue(server) as front, queue(server) as working:
                job = await submitted(front, n=2)
                working.work(worker._job)
                assert (await over(front, job.id)).status == "completed"
        assert len(lain) == 1
        assert lain[0] > QUICK.retry_seconds

    run(scenario)


def test_a_job_is_refused_for_what_the_generator_refuses_at_once() -> None:
    async def scenario() -> None:
        worker = image_worker(ImageConfig("tiny-image", num_inference_steps=4), generator=FakeGenerator())
        with pytest.raises(InvalidRequest) as caught:
            await anext(worker.check(REQUEST))
        assert caught.value.param == "lora"

    run(scenario)


def test_a_worker_that_leaves_still_answers_its_threads() -> None:
    async def nothing() -> None:
        """Neither waits."""

    async def scenario() -> None:
        said: list[str] = []

        async def state() -> str:
            return "of the text"

        threads = ThreadPoolExecutor(1)
        worker = image_worker(
            ImageConfig("tiny-image"), threads=threads, jobs=SimpleNamespace(close=nothing), close_arena=nothing
        )
        threads.submit(lambda: said.append(asyncio.run_coroutine_threadsafe(state(), worker.loop).result(2)))
        await worker.stop()
        assert said == ["of the text"]

    run(scenario)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_worker_that_leaves_takes_no_job_more_and_finishes_the_one_it_has(
    server: Any, tmp_path: Path, in_time: bool
) -> None:
    """One that does not get done within the drain gives it back at once, to be made by another."""

    async def scenario() -> None:
        generator, metrics, leaving = GatedGenerator(), FakeMetrics(), asyncio.Event()
        with ThreadPoolExecutor(1) as threads:
            async with (
                queue(server, PATIENT) as front,
                queue(server, PATIENT) as working,
                queue(server, PATIENT) as other,
            ):
                worker = image_worker(
                    ImageConfig("tiny-image"), store=Store(StoreConfig(url=str(tmp_path / "store"))), jobs=working,
                    generator=generator, metrics=metrics, images=metrics, threads=threads,
                    _wanted=lambda request: WANTED, job_queue=SimpleNamespace(observe=lambda seconds: None),
                    arena=SimpleNamespace(stats=lambda: SimpleNamespace(leases=0)),
                )  # fmt: skip
                working.work(worker._job, leaving)
                has, waits = [await submitted(front, str(number)) for number in range(2)]
                assert await asyncio.to_thread(generator.begun.acquire, timeout=BOUND)
                leaving.set()
                draining = asyncio.create_task(drained(worker))
                assert not (await asyncio.wait([draining], timeout=0.5))[0], "it leaves in the middle of a picture"
                if in_time:
                    generator.let_go.release()
                    await draining
                    assert (await front.state("", has.id)).status == "completed"
                else:
                    draining.cancel()
                    await working.close()
                    assert (await front.state("", has.id)).status == "queued"
                    generator.let_go.release()
                assert (await front.state("", waits.id)).status == "queued"
                other.work(nothing)
                assert [(await over(front, job.id)).attempts for job in (has, waits)] == [1, 1]
                assert not generator.begun.acquire(blocking=False)

    run(scenario)


async def drained(worker: ImageWorker) -> None:
    """What its process does before it closes anything."""
    for name in info_of(ImageWorker).marked("on_drain"):
        await getattr(worker, name)()


def test_no_pictures_at_once_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"^max-batch must be 1 at least$"):
        ImageConfig("tiny-image", max_batch=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    found = Server(tmp_path / "nats")
    yield found
    found.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK) as path:
        yield path


def test_a_job_whose_pictures_find_no_room_waits_and_shows_none_of_them_in_part(server: Any, disk: Path) -> None:
    """What is stored stands; the rest is stored once there is room, and the job has cost no attempt meanwhile."""

    async def scenario() -> None:
        store = Store(StoreConfig(url=str(disk / "store")))
        generator, metrics, lain = FakeGenerator(), FakeMetrics(), list[float]()
        with ThreadPoolExecutor(1) as threads:
            worker = image_worker(
                ImageConfig("tiny-image"), store=store, generator=generator, metrics=metrics, images=metrics,
                threads=threads, _wanted=lambda request: WANTED, job_queue=SimpleNamespace(observe=lain.append),
            )  # fmt: skip
            async with queue(server) as front, queue(server) as working:
                job = await submitted(front, n=PICTURES)
                working.work(worker._job)
                await eventually(lambda: generator.made >= FIT + 3)  # the fourth was made three times, in vain
                assert not (await front.state("", job.id)).over
                stored = await store.recent("", PICTURES + 1)
                assert {one.id for one in stored} == set(job.pictures[:FIT])
                for one in stored:
                    assert len(await store.get("", one.id)) == one.size > 300_000
                for name in job.pictures[FIT:]:
                    with pytest.raises(NotFound):
                        await store.get("", name)
                await asyncio.to_thread(enlarge, disk, "16m")
                ended = await over(front, job.id)
        assert (ended.status, ended.attempts, ended.error) == ("completed", 1, None)
        assert len(lain) == 1, "the job lay once"
        whole = await store.recent("", PICTURES + 1)
        assert {one.id for one in whole} == set(job.pictures)
        assert [one for one in whole if one.id in job.pictures[:FIT]] == stored, "what was there was not made again"

    run(scenario)


async def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
