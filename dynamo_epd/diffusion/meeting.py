# SPDX-License-Identifier: Apache-2.0
"""Pictures that are made at once meet at each denoise step, and the denoiser is called once for all of them.

Each picture is a greenlet that runs its own pipeline of diffusers, with its own scheduler; all of them are in one
thread, which is also torch's: of several threads each would have its own pool of OpenMP's, and they would spin for the
cores that one of them computes on. Nothing in a pipeline need stand two of them at once. Where a pipeline calls the
denoiser its greenlet puts the call down and the next one goes on; when nobody is left who could put down another, the
calls become one. A picture that comes later is therefore in after one step at most, whatever the others' step counts
are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import NoneType
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

ROWS = frozenset(
    {
        "encoder_attention_mask",
        "encoder_hidden_states",
        "guidance",
        "hidden_states",
        "pooled_projections",
        "sample",
        "text_embeds",
        "time_ids",
        "timestep",
    }
)
"""Tensors of which diffusers' denoisers take one row a picture."""
SHARED = frozenset({"img_ids", "txt_ids"})
"""Tensors that are the same for all rows (FLUX)."""

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]

log = logging.getLogger(__name__)


class Meeting:
    """Where pictures meet.

    Args:
        denoiser: called as diffusers' transformers and UNets are.
        at_once: pictures that may be in here together. The others wait in line, in the order in which they came.
        on_step: told how many pictures each call of the denoiser was for.
    """

    def __init__(self, denoiser: Any, at_once: int, on_step: Callable[[int], None]):
        self._denoiser = denoiser
        self._at_once = at_once
        self._on_step = on_step
        self._thread = ThreadPoolExecutor(1, "denoise")
        self._elsewhere = ThreadPoolExecutor(at_once, "away")
        self._lock = threading.Lock()
        """Of the line, and of whether the thread is at work."""
        self._line: deque[_Picture] = deque()
        self._at_work = False
        self._news: SimpleQueue[greenlet | None] = SimpleQueue()
        """Who is back; None: somebody is in the line."""
        # What follows is the thread's alone.
        self._inside: set[_Picture] = set()
        self._ready: deque[greenlet] = deque()
        """Of those inside: who can go on. The others have put a call down, or are away."""
        self._calls: list[_Call] = []
        self._most_rows: dict[torch.Size, int] = {}
        """By the shape of one row of latents, where more were too many for one call."""

    def make(self, kind: str | None, picture: Callable[[Any], T]) -> T:
        """What ``picture`` returns, or raises, when its turn has come, in the thread of this meeting. It is given what
        stands in its pipeline where the denoiser would. Called in any other thread, which waits.

        ``kind``: its adapter. Those inside all have the same.
        """
        made: Future[T] = Future()
        one = _Picture(kind, lambda: _told(made, lambda: picture(_Denoiser(self))))
        with self._lock:
            self._line.append(one)
            if self._at_work:
                self._news.put(None)
            else:
                self._at_work = True
                self._thread.submit(self._work)
        return made.result()

    def away(self, wait: Callable[[], T]) -> T:
        """What ``wait`` returns, or raises, in a thread of its own: nobody waits for a picture that waits. Called by a
        picture."""
        waited = self._elsewhere.submit(wait)
        me = getcurrent()
        waited.add_done_callback(lambda _: self._news.put(me))
        self._pause()
        return waited.result()

    def step(self, arguments: Arguments) -> Any:
        """One call of the denoiser, with those of the others who are at theirs now. Called by a picture."""
        call = _Call(arguments)
        self._calls.append(call)
        self._pause()
        return call.result()

    @staticmethod
    def _pause() -> None:
        parent = getcurrent().parent
        assert parent is not None, "called by no picture"
        parent.switch()

    @torch.inference_mode()  # of the thread, not of a picture: greenlets would end it for each other
    def _work(self) -> None:
        """Until nobody is inside, nor in the line."""
        while True:
            self._let_in()
            if self._ready:
                self._ready.popleft().switch()
            elif calls := self._calls:
                self._calls = []
                self._answer(calls)
                self._ready += [call.of for call in calls]
            elif self._inside:
                self._hear(self._news.get())
            elif self._is_over():
                return

    def _is_over(self) -> bool:
        with self._lock:
            self._at_work = bool(self._line)
            return not self._at_work

    def _hear(self, who: greenlet | None) -> None:
        if who is not None:
            self._ready.append(who)

    def _let_in(self) -> None:
        while True:
            try:
                self._hear(self._news.get_nowait())
            except Empty:
                break
        with self._lock:
            while self._line and self._has_room_for(self._line[0].kind):
                self._enter(self._line.popleft())

    def _has_room_for(self, kind: str | None) -> bool:
        return all(one.kind == kind for one in self._inside) and len(self._inside) < self._at_once

    def _enter(self, one: _Picture) -> None:
        def inside() -> None:
            one.make()
            self._inside.remove(one)

        self._inside.add(one)
        self._ready.append(greenlet(inside))

    def _answer(self, calls: list[_Call]) -> None:
        groups: list[list[_Call]] = []
        for call in calls:
            for group in groups:
                if go_together(group[0].arguments, call.arguments) and self._may_be_one([*group, call]):
                    group.append(call)
                    break
            else:
                groups.append([call])
        for group in groups:
            self._answer_group(group)

    def _answer_group(self, group: list[_Call]) -> None:
        failure = ""
        if len(group) > 1:
            try:
                rows = [rows_of(call.arguments) for call in group]
                given, named = together([call.arguments for call in group])
                outputs = self._denoiser(*given, **named)
                for call, *parts in zip(group, *(one.split(rows) for one in outputs), strict=True):
                    call.output = tuple(parts)
            except Exception as error:  # together they may want more memory than there is; it may be one's own error
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
                for call in group:
                    call.output = None
            else:
                self._on_step(len(group))
                return
        for call in group:
            try:
                call.output = self._denoiser(*call.arguments[0], **call.arguments[1])
            except Exception as error:
                call.error = error
            self._on_step(1)
        if failure and all(call.error is None for call in group):
            self._make_smaller(group, failure)

    def _may_be_one(self, group: list[_Call]) -> bool:
        most = self._most_rows.get(shape_of(group[0].arguments))
        return most is None or sum(rows_of(call.arguments) for call in group) <= most

    def _make_smaller(self, group: list[_Call], failure: str) -> None:
        """Those of ``group`` could be computed one by one and not together: what was tried in vain at one step is not
        tried at every other."""
        shape = shape_of(group[0].arguments)
        most = self._most_rows[shape] = sum(rows_of(call.arguments) for call in group) - 1
        log.warning("latents of %s are computed %d at once from now on: %s", tuple(shape), most, failure)


class _Denoiser:
    def __init__(self, meeting: Meeting):
        self._meeting = meeting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meeting._denoiser, name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._meeting.step((given, named))


@dataclass(frozen=True, eq=False)
class _Picture:
    kind: str | None
    make: Callable[[], None]


def _told(made: Future[T], make: Callable[[], T]) -> None:
    try:
        found = make()
    except BaseException as error:
        made.set_exception(error)
    else:
        made.set_result(found)


class _Call:
    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.of = getcurrent()
        """Who put it down."""
        self.output: Any = None
        self.error: Exception | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.output


NAMED = ("sample", "timestep")
"""What denoisers take by place, if they are given anything by place."""


def latents_of(arguments: Arguments) -> torch.Tensor:
    given, named = arguments
    found: torch.Tensor = given[0] if given else named["hidden_states"]
    return found


def rows_of(arguments: Arguments) -> int:
    """How many rows the latents of a call have: two where guidance is computed with the picture."""
    return len(latents_of(arguments))


def shape_of(arguments: Arguments) -> torch.Size:
    """Of one row of the latents of a call."""
    return latents_of(arguments).shape[1:]


def go_together(first: Arguments, second: Arguments) -> bool:
    """Whether one call can do what two calls ask for: all that is no row is equal, and the rows are of one shape.

    What is not known to be a row or shared is never merged: a denoiser that takes it is called once a picture.
    """
    (given, named), (others, other_named) = first, second
    if len(given) != len(others) or len(given) > len(NAMED) or named.keys() != other_named.keys():
        return False
    if not (given or "hidden_states" in named) or named.get("return_dict") is not False:
        return False
    counts = rows_of(first), rows_of(second)
    pairs = [*zip(NAMED, given, others, strict=False), *((name, named[name], other_named[name]) for name in named)]
    return all(_fits(name, one, other, counts) for name, one, other in pairs)


def _fits(name: str, first: Any, second: Any, counts: tuple[int, int]) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_fits(key, first[key], second[key], counts) for key in first)
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return (
            type(first) is type(second) and isinstance(first, bool | int | float | str | NoneType) and first == second
        )
    if first.dtype != second.dtype or first.device != second.device or first.shape[1:] != second.shape[1:]:
        return False
    if name in SHARED:
        return torch.equal(first, second)
    if name == "timestep" and first.ndim == second.ndim == 0:
        return True
    return name in ROWS and first.ndim == second.ndim > 0 and (len(first), len(second)) == counts


def together(calls: Sequence[Arguments]) -> Arguments:
    """Calls of which each goes together with the first, as one: rows under rows, in the order of the calls."""
    rows = [rows_of(call) for call in calls]
    given = tuple(
        _joined(name, values, rows) for name, *values in zip(NAMED, *(call[0] for call in calls), strict=False)
    )
    return given, {name: _joined(name, [call[1][name] for call in calls], rows) for name in calls[0][1]}


def _joined(name: str, values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {key: _joined(key, [value[key] for value in values], rows) for key in first}
    if not isinstance(first, torch.Tensor) or name in SHARED:
        return first
    if first.ndim == 0:  # one time for all rows of a call, as UNets are given it; they take one for each row too
        return torch.cat([value.expand(count) for value, count in zip(values, rows, strict=True)])
    return torch.cat(list(values))
