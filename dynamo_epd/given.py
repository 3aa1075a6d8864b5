# SPDX-License-Identifier: Apache-2.0
"""What a worker gave in reply to which call, so that it can be taken back from a caller that left without the reply.

The runtime drops a reply whose caller has asked to stop while it was on its way. What the reply hands over would then
be held until its lease ends. So a caller that leaves says so in a message of its own, which may come first or last.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Thing = TypeVar("Thing")

MOST = 8192
"""Calls that are remembered: many times what may be in flight."""


class Given(Generic[Thing]):
    """Things by the id of their call. None stands for a caller that has left."""

    def __init__(self, most: int = MOST):
        self._most = most
        self._things: dict[str, list[Thing] | None] = {}

    def give(self, call: str, thing: Thing) -> bool:
        """False where the caller has left already: nobody will take the thing."""
        given = self._of(call)
        if given is None:
            return False
        given.append(thing)
        return True

    def has_left(self, call: str) -> bool:
        """Whether the caller has said so: what is not yet begun for it need not be."""
        return self._things.get(call, []) is None

    def take_back(self, call: str) -> list[Thing]:
        """What was given to a caller that has left. What would be given to it from now on is refused."""
        given = self._of(call)
        self._things[call] = None
        return given or []

    def _of(self, call: str) -> list[Thing] | None:
        if call not in self._things:
            self._things[call] = []
            if len(self._things) > self._most:
                del self._things[next(iter(self._things))]
        return self._things[call]
