# SPDX-License-Identifier: Apache-2.0
"""Decorators for what a service offers and for the moments of its life. They only mark functions; nothing runs here."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

DEFAULT_IN_FLIGHT = 1024
_MARK = "__dynamo_mark__"


@dataclasses.dataclass(frozen=True)
class Mark:
    """What a decorated function is: ``kind`` is endpoint, api, on_start, on_drain, on_shutdown, liveness or
    readiness."""

    kind: str
    name: str = ""
    max_in_flight: int = DEFAULT_IN_FLIGHT
    addressed: bool = False


def mark_of(function: Any) -> Mark | None:
    return getattr(function, _MARK, None)


def _marked(function: Callable[..., Any], mark: Mark) -> Callable[..., Any]:
    setattr(function, _MARK, mark)
    return function


def endpoint(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    max_in_flight: int = DEFAULT_IN_FLIGHT,
    addressed: bool = False,
) -> Any:
    """An async generator that other services may call. Above ``max_in_flight`` at once it answers `Overloaded`.

    One that is ``addressed`` is asked of the instance that served the caller before: a worker that leaves answers there
    until it owes nobody anything, while its others are given to its neighbours.
    """
    if isinstance(function, str):  # 0.2.1 took the name as first argument
        function, name = None, function

    def mark(target: Callable[..., Any]) -> Callable[..., Any]:
        return _marked(target, Mark("endpoint", name or target.__name__, max_in_flight, addressed))

    return mark(function) if function is not None else mark


def abstract_endpoint(function: Callable[..., Any]) -> Any:
    """An endpoint that every concrete service of an `AbstractService` must bring."""
    return abstractmethod(endpoint(function))


def api(function: Callable[..., Any] | None = None, *, name: str | None = None) -> Any:
    """An HTTP POST route ``/<name>`` of the service's own small server."""
    if isinstance(function, str):
        function, name = None, function

    def mark(target: Callable[..., Any]) -> Callable[..., Any]:
        return _marked(target, Mark("api", name or target.__name__))

    return mark(function) if function is not None else mark


def _moment(kind: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any] | None = None) -> Any:
        def mark(target: Callable[..., Any]) -> Callable[..., Any]:
            return _marked(target, Mark(kind))

        return mark(function) if function is not None else mark

    decorate.__name__ = kind
    return decorate


async_on_start = _moment("on_start")
async_on_start.__doc__ = "Runs after ``__init__`` and before anything is served; bare or called, also inherited."
on_drain = _moment("on_drain")
on_drain.__doc__ = (
    "Runs in a worker that leaves, after its last request and within the drain's bound: to wait for those who still "
    "are to fetch something."
)
on_shutdown = _moment("on_shutdown")
on_shutdown.__doc__ = "Runs after the last request has finished; hooks run in the reverse of their order of definition."
liveness = _moment("liveness")
liveness.__doc__ = (
    "Marks a function that tells whether the service lives: on a no the process ends, to be started again; without its "
    "shutdown hooks where `Hung` is raised."
)
readiness = _moment("readiness")
readiness.__doc__ = (
    "Marks a function that must say yes, after the start hooks, before anything is served; it is asked until it does."
)
