# SPDX-License-Identifier: Apache-2.0
"""Which outputs of an engine leave it together, by vLLM's own messages and a clock that only waits turn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason, UtilityOutput
from vllm.v1.metrics.stats import PrefillStats

from dynamo_epd.engine import gathering
from dynamo_epd.engine.gathering import gather

Item = tuple[int, EngineCoreOutputs] | bytes


class Clock:
    """What waits for an event waits by this: the engine does ``meanwhile``, and then the time is over, if nothing is
    urgent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        self.waited: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None
        monkeypatch.setattr(gathering.time, "monotonic", lambda: self.now)
        clock = self

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert timeout is not None
                if timeout and not self.is_set():
                    clock.meanwhile()
                    clock.meanwhile = lambda: None
                    if not self.is_set():
                        clock.now += timeout
                        clock.waited.append(timeout)
                return self.is_set()

        monkeypatch.setattr(gathering.threading, "Event", Event)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def outputs(clock: Clock) -> queue.Queue[Item]:
    made: queue.Queue[Item] = queue.Queue()
    gather(made, 0.005)
    return made


def tokens(number: int, *, first: bool = False, last: bool = False) -> tuple[int, EngineCoreOutputs]:
    output = EngineCoreOutput(
        "request",
        [number],
        prefill_stats=PrefillStats() if first else None,
        finish_reason=FinishReason.LENGTH if last else None,
    )
    return 0, EngineCoreOutputs(outputs=[output])


def read(outputs: queue.Queue[Item]) -> int | None:
    """The token of the next item, if it has one."""
    item = outputs.get(timeout=30)
    assert not isinstance(item, bytes)
    return item[1].outputs[0].new_token_ids[0] if item[1].outputs else None


def test_tokens_wait_for_those_that_follow_sooner(clock: Clock, outputs: queue.Queue[Item]) -> None:
    outputs.put_nowait(tokens(1))
    assert (read(outputs), clock.waited) == (1, []), "long after what came before: at once"

    def step() -> None:
        for number in (2, 3):
            clock.now += 0.002
            outputs.put_nowait(tokens(number))

    clock.meanwhile = step
    clock.now += 0.0005
    assert (read(outputs), clock.waited) == (2, [pytest.approx(0.0045)])
    outputs.put_nowait(tokens(4))
    assert (read(outputs), len(clock.waited)) == (3, 1), "with the one before it"
    assert (read(outputs), len(clock.waited)) == (4, 2), "came after those, and waits by itself"
    clock.now += 0.005
    outputs.put_nowait(tokens(5))
    assert (read(outputs), len(clock.waited)) == (5, 2), "steps that take longer are sent one by one"


@pytest.mark.parametrize(
    "urgent",
    [tokens(3, first=True), tokens(3, last=True), (0, EngineCoreOutputs(utility_output=UtilityOutput(7))), b"dead"],
    ids=["a first token", "a last one", "the reply to a call", "the engine's end"],
)
def test_what_says_more_than_tokens_waits_for_nothing_and_overtakes_nothing(
    clock: Clock, outputs: queue.Queue[Item], urgent: Item
) -> None:
    outputs.put_nowait(tokens(1))
    assert read(outputs) == 1
    outputs.put_nowait(tokens(2))
    clock.meanwhile = lambda: outputs.put_nowait(urgent)
    assert read(outputs) == 2
    assert outputs.get(timeout=30) is urgent
    assert (clock.waited, outputs.empty()) == ([], True)
    outputs.put_nowait(tokens(4))
    assert (read(outputs), len(clock.waited)) == (4, 1), "what was urgent is over"


def test_statistics_of_steps_that_wait_for_a_transfer_can_wait(clock: Clock, outputs: queue.Queue[Item]) -> None:
    for _ in range(3):
        outputs.put_nowait((0, EngineCoreOutputs()))
        assert read(outputs) is None
    assert clock.waited == [pytest.approx(0.005)] * 2


def test_what_was_in_the_queue_stays_in_it(clock: Clock) -> None:
    made: queue.Queue[Item] = queue.Queue()
    made.put_nowait(tokens(1))
    gather(made, 0.005)
    assert (read(made), clock.waited) == (1, [])
