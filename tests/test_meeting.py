# SPDX-License-Identifier: Apache-2.0
"""Pictures that meet in one denoiser: which calls become one, who waits for whom, and what happens when one fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import torch

from dynamo_epd.diffusion.meeting import Meeting, go_together, together

BOUND = 30.0


class Doubling:
    """A denoiser that doubles its latents and remembers how many rows each call had."""

    config = "of the denoiser"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, latents: torch.Tensor, *, encoder_hidden_states: torch.Tensor, return_dict: bool) -> Any:
        self.calls.append(len(latents))
        assert len(encoder_hidden_states) == len(latents)
        if (latents < 0).any():
            raise ValueError("negative")
        return (latents * 2,)


def call(value: float, rows: int = 1, width: int = 3) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.full((rows, width), value),), {"encoder_hidden_states": torch.zeros(rows, 2), "return_dict": False}


def picture(meeting: Meeting, value: float, steps: int, told: Callable[[int], None] = lambda _: None) -> list[float]:
    """As a pipeline does: one call a step. Returns what each said."""

    def drawn(denoiser: Any) -> list[float]:
        found = []
        for step in range(steps):
            given, named = call(value + step)
            found.append(float(denoiser(*given, **named)[0][0, 0]))
            told(step)
        return found

    return meeting.make(None, drawn)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_one_after_another_is_called_alone() -> None:
    denoiser, sizes = Doubling(), list[int]()
    meeting = Meeting(denoiser, 4, sizes.append)
    assert picture(meeting, 1, steps=3) == [2, 4, 6]
    assert picture(meeting, 5, steps=2) == [10, 12]
    assert denoiser.calls == sizes == [1] * 5
    assert meeting.make(None, lambda stand_in: stand_in.config) == "of the denoiser"


def all_at_once(meeting: Meeting, one: Callable[[float], Any], values: list[float]) -> list[Any]:
    """Pictures of which none begins before all are in the line."""
    with ThreadPoolExecutor(1 + len(values)) as threads, held(meeting, threads):
        found = threads.map(one, values)
        eventually(lambda: len(meeting._line) == len(values))
    return list(found)


@contextmanager
def held(meeting: Meeting, threads: ThreadPoolExecutor) -> Iterator[None]:
    """The meeting's thread is at somebody's picture, which calls no denoiser."""
    entered, may_go = threading.Event(), threading.Event()

    def holding(_: Any) -> None:
        entered.set()
        assert may_go.wait(BOUND)

    holder = threads.submit(meeting.make, None, holding)
    assert entered.wait(BOUND)
    try:
        yield
    finally:
        may_go.set()
        holder.result(BOUND)


def test_pictures_that_are_there_share_their_steps_and_get_their_own_rows() -> None:
    denoiser, sizes = Doubling(), list[int]()
    meeting = Meeting(denoiser, 5, sizes.append)
    found = all_at_once(meeting, lambda value: picture(meeting, value, steps=5), [0, 10, 20, 30])
    assert found == [[2.0 * (value + step) for step in range(5)] for value in (0, 10, 20, 30)]
    assert denoiser.calls == sizes == [4] * 5


def test_pictures_of_fewer_steps_leave_the_others_to_themselves() -> None:
    sizes: list[int] = []
    meeting = Meeting(Doubling(), 5, sizes.append)
    all_at_once(meeting, lambda value: picture(meeting, value, steps=int(value)), [1, 2, 4])
    assert sizes == [3, 2, 1, 1]


def test_a_late_one_is_in_after_one_step() -> None:
    """It comes while the first is between two steps, or in one: the next but one is shared."""
    sizes: list[int] = []
    meeting = Meeting(Doubling(), 2, sizes.append)
    late: list[threading.Thread] = []

    def told(step: int) -> None:
        if step == 3:
            late.append(threading.Thread(target=lambda: picture(meeting, 50, steps=4)))
            late[0].start()
            eventually(lambda: len(meeting._line) == 1)

    picture(meeting, 1, steps=60, told=told)
    late[0].join(BOUND)
    assert sizes == [1] * 4 + [2] * 4 + [1] * 52


def test_no_more_are_inside_than_may_be_and_others_come_in_order() -> None:
    sizes: list[int] = []
    meeting = Meeting(Doubling(), 1, sizes.append)
    order: list[int] = []

    def one(index: int) -> None:
        picture(meeting, index, 2, lambda _: order.append(index))

    with ThreadPoolExecutor(4) as threads, held(meeting, threads):
        for index in range(3):
            threads.submit(one, index)
            eventually(lambda index=index: len(meeting._line) == index + 1)  # type: ignore[misc]
        assert order == []
    assert order == [0, 0, 1, 1, 2, 2]
    assert sizes == [1] * 6


def test_those_of_another_adapter_wait_until_all_of_this_one_are_out() -> None:
    meeting = Meeting(Doubling(), 8, lambda _: None)
    seen: list[str] = []
    entered, may_leave = threading.Event(), threading.Event()

    def first(_: Any) -> None:
        seen.append("red")
        entered.set()
        assert meeting.away(lambda: may_leave.wait(BOUND))
        seen.append("red is out")

    with ThreadPoolExecutor(3) as threads:
        made = [threads.submit(meeting.make, "red", first)]
        assert entered.wait(BOUND)
        for index, kind in enumerate(("blue", "red")):  # a red one that comes later does not pass the blue one
            made.append(threads.submit(meeting.make, kind, lambda _, kind=kind: seen.append(kind)))
            eventually(lambda index=index: len(meeting._line) == index + 1)  # type: ignore[misc]
        may_leave.set()
        for one in made:
            one.result(BOUND)
    assert seen == ["red", "red is out", "blue", "red"]


def test_nobody_waits_for_who_is_away() -> None:
    sizes: list[int] = []
    meeting = Meeting(Doubling(), 2, sizes.append)
    left, may_return = threading.Event(), threading.Event()

    def waiting(denoiser: Any) -> str:
        thread = threading.current_thread()

        def wait() -> str:
            assert threading.current_thread() is not thread
            left.set()
            assert may_return.wait(BOUND)
            return "told"

        found = meeting.away(wait)
        given, named = call(7)
        denoiser(*given, **named)
        return found

    with ThreadPoolExecutor(1) as threads:
        one = threads.submit(meeting.make, None, waiting)
        assert left.wait(BOUND)
        assert picture(meeting, 1, steps=3) == [2, 4, 6]
        may_return.set()
        assert one.result(BOUND) == "told"
    assert sizes == [1] * 4


def test_what_was_waited_for_in_vain_is_that_pictures_error() -> None:
    meeting = Meeting(Doubling(), 2, lambda _: None)

    def refused() -> None:
        raise ConnectionError("nobody there")

    with pytest.raises(ConnectionError, match="nobody there"):
        meeting.make(None, lambda _: meeting.away(refused))
    assert picture(meeting, 1, steps=1) == [2]


def test_all_pictures_are_made_in_one_thread_and_keep_their_own_contexts() -> None:
    meeting = Meeting(Doubling(), 4, lambda _: None)
    threads: set[int] = set()
    own: ContextVar[float] = ContextVar("own", default=-1)

    def one(value: float) -> tuple[float, float]:
        def drawn(denoiser: Any) -> tuple[float, float]:
            before = own.get()
            own.set(value)
            given, named = call(value)
            assert denoiser(*given, **named)[0].is_inference()
            threads.add(threading.get_ident())
            return before, own.get()

        return meeting.make(None, drawn)

    assert all_at_once(meeting, one, [1.0, 2.0, 3.0]) == [(-1, 1), (-1, 2), (-1, 3)]
    assert one(4.0) == (-1, 4)
    assert len(threads) == 1


class Narrow(Doubling):
    """A double of a card that has memory for four rows of the width 3, and for any number of others."""

    def __call__(self, latents: torch.Tensor, *, encoder_hidden_states: torch.Tensor, return_dict: bool) -> Any:
        found = super().__call__(latents, encoder_hidden_states=encoder_hidden_states, return_dict=return_dict)
        if latents.shape[1] == 3 and len(latents) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return found


def test_more_rows_than_there_is_memory_for_are_not_tried_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    denoiser, sizes = Narrow(), list[int]()
    meeting = Meeting(denoiser, 8, sizes.append)

    def guided(width: float) -> None:
        def drawn(denoiser: Any) -> None:
            for step in range(6):
                given, named = call(step, rows=2, width=int(width))
                assert denoiser(*given, **named)[0].eq(2 * step).all()

        meeting.make(None, drawn)

    all_at_once(meeting, guided, [3, 3, 3, 3])
    assert denoiser.calls[:2] == [8, 2], "each is computed alone where they could not be together"
    assert sorted(rows for rows in denoiser.calls if rows > 4) == [6, 8], "each number that is too many is tried once"
    assert denoiser.calls[-2:] == [4, 4]
    assert len(caplog.messages) == 2
    all_at_once(meeting, guided, [5, 5, 5, 5])
    assert denoiser.calls[-1] == 8, "others are no smaller for it"


def test_an_error_is_that_pictures_alone() -> None:
    meeting = Meeting(Doubling(), 4, lambda _: None)

    def one(value: float) -> Any:
        try:
            return picture(meeting, value, steps=1)
        except ValueError as error:
            return str(error)

    assert all_at_once(meeting, one, [1.0, -1.0, 3.0]) == [[2.0], "negative", [6.0]]
    assert all_at_once(meeting, one, [4.0, 5.0, 6.0]) == [[8.0], [10.0], [12.0]]
    assert meeting._denoiser.calls[-1] == 3, "nothing is left behind"


def named(**changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call as FLUX's pipeline makes it."""
    values: dict[str, Any] = {
        "hidden_states": torch.zeros(1, 16, 4),
        "timestep": torch.zeros(1),
        "guidance": None,
        "pooled_projections": torch.zeros(1, 8),
        "encoder_hidden_states": torch.zeros(1, 5, 8),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.zeros(16, 3),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    return (), values | changed


@pytest.mark.parametrize(
    ("changed", "go"),
    [
        ({}, True),
        ({"timestep": torch.ones(1)}, True),
        ({"hidden_states": torch.zeros(1, 32, 4)}, False),
        ({"hidden_states": torch.zeros(1, 16, 4, dtype=torch.float16)}, False),
        ({"img_ids": torch.ones(16, 3)}, False),
        ({"guidance": torch.ones(1)}, False),
        ({"joint_attention_kwargs": {"scale": 0.5}}, False),
        ({"return_dict": True}, False),
        ({"something": torch.zeros(1)}, False),
    ],
)
def test_which_calls_go_together(changed: dict[str, Any], go: bool) -> None:
    assert go_together(named(), named(**changed)) == go
    assert go_together(named(**changed), named()) == go


def test_what_is_not_known_is_never_merged() -> None:
    assert not go_together(named(something=torch.zeros(1)), named(something=torch.zeros(1)))
    assert not go_together(named(something=[torch.zeros(1)]), named(something=[torch.zeros(1)]))


def test_calls_of_different_rows_and_one_time_each_become_one() -> None:
    """As UNets are called: one time, without a dimension, for all rows of a call."""

    def unet(rows: int, time: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        conditions = {"text_embeds": torch.full((rows, 2), time), "time_ids": torch.zeros(rows, 6)}
        return (torch.full((rows, 4, 2, 2), time), torch.tensor(time)), {
            "encoder_hidden_states": torch.zeros(rows, 7, 2),
            "added_cond_kwargs": conditions,
            "return_dict": False,
        }

    calls = [unet(2, 5.0), unet(1, 7.0)]
    assert go_together(*calls)
    (sample, times), rest = together(calls)
    assert sample.shape == (3, 4, 2, 2)
    assert times.tolist() == [5, 5, 7]
    assert rest["added_cond_kwargs"]["text_embeds"][:, 0].tolist() == [5, 5, 7]
    assert rest["return_dict"] is False
