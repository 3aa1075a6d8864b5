# SPDX-License-Identifier: Apache-2.0
"""`@service` records what a class offers and needs. The class stays a plain class; nothing is started."""

from __future__ import annotations

import dataclasses
import os
import sys
from abc import ABC
from collections.abc import Callable
from typing import Any

from dynamo_epd.sdk.dependency import Dependency
from dynamo_epd.sdk.endpoints import Mark, mark_of

DYNAMO_IMAGE = os.environ.get("DYNAMO_IMAGE", "dynamo:latest-vllm")
DEFAULT_NAMESPACE = "dynamo"
_INFO = "__dynamo_service__"


class AbstractService(ABC):  # noqa: B024 - its subclasses have the abstract endpoints
    """Base of an interface: other services depend on it, graphs link a concrete one."""


@dataclasses.dataclass
class ServiceInfo:
    """What the decorator was told, plus what the class body holds. ``resources``: ``cpu``, ``memory``, ``gpu``."""

    cls: type
    name: str
    namespace: str
    enabled: bool = True
    component_type: str | None = None
    resources: dict[str, Any] = dataclasses.field(default_factory=dict)
    workers: int = 1
    image: str | None = None
    envs: list[dict[str, str]] = dataclasses.field(default_factory=list)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    kubernetes_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    app: Any = None
    config: type | None = None
    engine_args: bool = False
    runs_if: Callable[[Any], bool] | None = None
    links: list[tuple[str, str, type]] = dataclasses.field(default_factory=list)
    """(module that linked, attribute of the depends, linked service)"""

    @property
    def dependencies(self) -> dict[str, Dependency]:
        return {name: value for name, value in _members(self.cls).items() if isinstance(value, Dependency)}

    def marked(self, kind: str) -> dict[str, Mark]:
        """Attribute name → mark, base classes first, each in order of definition."""
        found = {name: mark_of(value) for name, value in _members(self.cls).items()}
        return {name: mark for name, mark in found.items() if mark is not None and mark.kind == kind}


def _members(cls: type) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        members.update(vars(base))
    return members


def is_service(value: Any) -> bool:
    return isinstance(value, type) and _INFO in vars(value)


def info_of(cls: type) -> ServiceInfo:
    if not is_service(cls):
        raise TypeError(f"{cls!r} is not a @service")
    found: ServiceInfo = vars(cls)[_INFO]
    return found


def service(
    cls: type | None = None,
    *,
    dynamo: dict[str, Any] | None = None,
    resources: dict[str, Any] | None = None,
    workers: int = 1,
    image: str | None = None,
    envs: list[dict[str, str]] | None = None,
    labels: dict[str, str] | None = None,
    kubernetes_overrides: dict[str, Any] | None = None,
    app: Any = None,
    config: type | None = None,
    engine_args: bool = False,
    runs_if: Callable[[Any], bool] | None = None,
    **old: Any,
) -> Any:
    """Makes a class a service of a graph.

    ``config`` is a frozen dataclass: its fields are the keys that the YAML may have. With ``engine_args`` the other
    keys may be vLLM's engine arguments and end up in the field ``engine_args``. Without ``config`` any key is taken.
    One whose ``tls`` is set serves HTTPS; ``request_seconds`` is how long a request may take that the service lets in,
    and so how long a pod of the graph may finish what it has.
    ``runs_if`` sees the config and says whether processes are started at all. Names that only the old SDK's server
    had (``traffic``, ``name``, ...) are recorded nowhere, except ``name``.
    """

    def decorate(target: type) -> type:
        given = dict(dynamo or {})
        info = ServiceInfo(
            cls=target,
            name=given.get("name") or old.get("name") or target.__name__,
            namespace=given.get("namespace") or os.environ.get("DYN_NAMESPACE") or DEFAULT_NAMESPACE,
            enabled=given.get("enabled", True),
            component_type=given.get("component_type"),
            resources={key: value for key, value in (resources or {}).items() if value is not None},
            workers=workers,
            image=image,
            envs=list(envs or []),
            labels=dict(labels or {}),
            kubernetes_overrides=dict(kubernetes_overrides or {}),
            app=app,
            config=config,
            engine_args=engine_args,
            runs_if=runs_if,
        )
        setattr(target, _INFO, info)
        target.link = classmethod(_link)  # type: ignore[attr-defined]
        target.dynamo_address = classmethod(_dynamo_address)  # type: ignore[attr-defined]
        return target

    return decorate(cls) if cls is not None else decorate


def _dynamo_address(cls: type) -> tuple[str, str]:
    """(namespace, component name) as the decorator gave them; a config may change both for its own graph."""
    info = info_of(cls)
    return info.namespace, info.name


def _link(cls: type, other: type) -> type:
    """Says that ``other`` serves the one ``depends`` of this class that it satisfies, and returns ``other``.

    The link belongs to the module that calls, so that two graphs in one process do not affect each other.
    """
    if not is_service(other):
        raise ValueError(f"{cls.__name__}.link: {other!r} is not a @service")
    fitting = [name for name, needed in info_of(cls).dependencies.items() if needed.accepts(other)]
    if len(fitting) != 1:
        what = "no depends" if not fitting else "more than one depends (" + ", ".join(fitting) + ")"
        raise ValueError(
            f"{cls.__name__}.link({other.__name__}): {cls.__name__} has {what} that {other.__name__} satisfies"
        )
    module = sys._getframe(1).f_globals.get("__name__", "")
    info_of(cls).links.append((module, fitting[0], other))
    return other
