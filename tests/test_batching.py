# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Sequence

import pytest

from dynamo_epd.batching import Batcher
from dynamo_epd.errors import InvalidRequest, Overloaded
from dynamo_epd.failures import IN_A_ROW, Hung
from tests.fake_clock import FakeClock


class Doubling:
    """Doubles numbers; the first batch waits for `go`, so that later ones gather behind it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.began.set()
        assert self.go.wait(10)
        if -1 in items:
            raise RuntimeError("a bad item")
        return [2 * item for item in items]


def test_what_gathers_while_a_batch_runs_is_the_next_batch():
    async def main() -> None:
        run = Doubling()
        sizes: list[int] = []
        batcher = Batcher(run, most=3, waiting=100, observe=sizes.append)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        rest = [asyncio.create_task(batcher.submit(number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        assert len(batcher) == 5
        run.go.set()
        assert (await first).result == 0
        assert [one.result for one in await asyncio.gather(*rest)] == [2, 4, 6, 8, 10]
        assert run.batches == [[0], [1, 2, 3], [4, 5]]
        assert sizes == [1, 3, 2]
        batcher.close()

    asyncio.run(main())


def test_an_item_cancelled_while_it_waits_never_runs():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=8, waiting=100)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        kept, dropped = (asyncio.create_task(batcher.submit(number)) for number in (1, 2))
        await asyncio.sleep(0)
        dropped.cancel()
        await asyncio.gather(dropped, return_exceptions=True)
        run.go.set()
        assert [(await first).result, (await kept).result] == [0, 2]
        assert run.batches == [[0], [1]]
        batcher.close()

    asyncio.run(main())


def test_a_batch_that_fails_fails_its_own_items_only():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=2, waiting=100)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        rest = [asyncio.create_task(batcher.submit(number)) for number in (1, -1, 3)]
        await asyncio.sleep(0)
        run.go.set()
        assert (await first).result == 0
        one, bad, three = await asyncio.gather(*rest, return_exceptions=True)
        assert isinstance(one, RuntimeError)
        assert isinstance(bad, RuntimeError)
        assert not isinstance(three, BaseException)
        assert three.result == 6
        batcher.close()

    asyncio.run(main())


def test_of_one_failure_asyncio_says_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        def run(items: Sequence[int]) -> Sequence[int]:
            raise RuntimeError("the batch fails")

        batcher = Batcher(run, most=3, waiting=100)
        with pytest.raises(RuntimeError, match="the batch fails"):
            await batcher.submit_all([0, 1, 2, 3, 4])
        await asyncio.sleep(0.01)
        batcher.close()

    asyncio.run(main())
    gc.collect()
    assert not caplog.messages


def test_a_batch_with_other_results_than_items_fails_and_nobody_waits_for_ever():
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items: list(items)[1:], most=3, waiting=100)
        with pytest.raises(ValueError, match="0 results of 1 items"):
            await asyncio.wait_for(batcher.submit(0), 10)
        batcher.close()

    asyncio.run(main())


def test_what_fails_again_and_again_is_told_from_what_fails_now_and_then():
    async def main() -> None:
        broken = True

        def run(items: Sequence[int]) -> Sequence[int]:
            if items[0] == -1:
                raise InvalidRequest("a refusal")
            if broken:
                raise RuntimeError("the device is gone")
            return items

        batcher = Batcher(run, most=3, waiting=100)

        async def fails(times: int, item: int) -> None:
            for _ in range(times):
                with pytest.raises((RuntimeError, InvalidRequest)):
                    await batcher.submit(item)

        await fails(IN_A_ROW - 1, 0)
        broken = False
        await batcher.submit(0)
        broken = True
        await fails(IN_A_ROW - 1, 0)
        await fails(IN_A_ROW, -1)
        assert not batcher.failures.too_many
        await fails(1, 0)
        assert batcher.failures.too_many
        batcher.close()

    asyncio.run(main())


def test_more_than_may_wait_is_refused():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=1, waiting=2)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        waiting = [asyncio.create_task(batcher.submit(number)) for number in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit(3)
        run.go.set()
        assert [one.result for one in await asyncio.gather(first, *waiting)] == [0, 2, 4]
        batcher.close()

    asyncio.run(main())


def test_a_request_of_several_is_taken_on_whole_or_not_at_all():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=10, waiting=3)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        left = asyncio.create_task(batcher.submit_all([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await batcher.submit_all([3, 4])
        assert len(batcher) == 2
        left.cancel()
        last = asyncio.create_task(batcher.submit(5))
        await asyncio.sleep(0)
        run.go.set()
        assert [one.result for one in await asyncio.gather(first, last)] == [0, 10]
        assert run.batches == [[0], [5]]
        batcher.close()

    asyncio.run(main())


def test_a_batch_is_bounded_by_weight_and_one_too_heavy_runs_alone():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=10, waiting=100, weight=lambda item: item)
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.to_thread(run.began.wait, 10)
        rest = [asyncio.create_task(batcher.submit(number)) for number in (4, 6, 3, 12, 2)]
        await asyncio.sleep(0)
        run.go.set()
        await asyncio.gather(first, *rest)
        assert run.batches == [[1], [4, 6], [3], [12], [2]]
        batcher.close()

    asyncio.run(main())


def test_waiting_and_running_are_told_apart():
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=1, waiting=100)
        first = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        second = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.5)
        run.go.set()
        before, after = await first, await second
        assert before.run_seconds >= 0.5 and before.run_seconds > before.queue_seconds
        assert after.queue_seconds >= 0.5 and after.queue_seconds > after.run_seconds
        batcher.close()

    asyncio.run(main())


def test_a_batch_that_hangs_is_known_although_its_caller_has_left(clock: FakeClock):
    async def main() -> None:
        run = Doubling()
        batcher = Batcher(run, most=1, waiting=100, silence=60)
        asked = asyncio.create_task(batcher.submit(0))
        await asyncio.to_thread(run.began.wait, 10)
        asked.cancel()
        clock.now += 60
        assert batcher.failures.alive()
        clock.now += 1
        with pytest.raises(Hung):
            batcher.failures.alive()
        run.go.set()
        assert (await batcher.submit(1)).result == 2
        assert batcher.failures.alive()
        batcher.close()

    asyncio.run(main())
