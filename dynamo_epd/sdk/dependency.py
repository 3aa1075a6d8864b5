# SPDX-License-Identifier: Apache-2.0
"""`depends`: one service names another that it calls."""

from __future__ import annotations

from typing import Any

from dynamo_epd.sdk.endpoints import mark_of


class Dependency:
    """On the class the record, on an instance the client that calls the other service (`client.ServiceClient`)."""

    def __init__(self, on: type | None):
        self.on = on
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        clients = instance.__dict__.setdefault("__dynamo_clients__", {})
        if self.name not in clients:
            from dynamo_epd.sdk.client import client_for

            clients[self.name] = client_for(type(instance), self.name)
        return clients[self.name]

    def accepts(self, service: type) -> bool:
        """Whether ``service`` is, extends or (for an abstract one) brings every endpoint of what is depended on."""
        if self.on is None:
            return True
        if issubclass(service, self.on):
            return True
        wanted = [name for name in getattr(self.on, "__abstractmethods__", ()) if mark_of(getattr(self.on, name))]
        return bool(wanted) and all(mark_of(getattr(service, name, None)) for name in wanted)


def depends(on: type | None = None, **_: Any) -> Any:
    """``self.x = depends(X)``: ``self.x.<endpoint>(request)`` is then an async iterator of X's typed replies."""
    return Dependency(on)
