# SPDX-License-Identifier: Apache-2.0
"""A graph: a root service and what it reaches over its links."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

from dynamo_epd.sdk.service import info_of, is_service


class GraphError(ValueError):
    """The graph string names nothing, or not one root."""


class ModuleFailed(Exception):
    """The graph's module raised something while it was imported. The message is one line: where, and what."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """``edges``: (service, attribute of its depends) → the service that answers there. Pruned depends are not in it."""

    root: type
    services: dict[str, type]
    edges: dict[tuple[type, str], type]

    def service(self, name: str) -> type:
        if name not in self.services:
            raise GraphError(f"no service {name!r} in this graph; it has {', '.join(self.services)}")
        return self.services[name]


def build_graph(root: type, module: str) -> Graph:
    """The graph of ``root`` under the links that ``module`` made. Without any link every depends counts."""
    edges: dict[tuple[type, str], type] = {}
    linked = _linked_in(module, root)
    services: dict[str, type] = {}
    todo = [root]
    while todo:
        current = todo.pop(0)
        known = services.setdefault(current.__name__, current)
        if known is not current:
            raise GraphError(f"two services of this graph are called {current.__name__}")
        info = info_of(current)
        for attribute, dependency in info.dependencies.items():
            target = linked.get((current, attribute)) if linked else dependency.on
            if target is None or not is_service(target):
                continue
            edges[current, attribute] = target
            if target not in todo and target is not services.get(target.__name__):
                todo.append(target)
    return Graph(root, services, edges)


def _linked_in(module: str, root: type) -> dict[tuple[type, str], type]:
    found: dict[tuple[type, str], type] = {}
    todo, seen = [root], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for origin, attribute, target in info_of(current).links:
            if origin == module:
                found[current, attribute] = target
                todo.append(target)
    return found


def load_graph(spec: str, working_dir: str | None = None) -> Graph:
    """The graph that ``module[:attr]`` or ``path/to/file.py[:attr]`` names.

    Without ``attr`` it is the one root service of the module. An ImportError inside the user's module comes through.
    Raises GraphError when nothing, or more than one root, is found, and for what is no Python; ModuleFailed for
    whatever else the module raises.
    """
    directory = Path(working_dir or ".").resolve()
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    place, _, attribute = spec.partition(":")
    try:
        module = _import(place, directory)
    except SyntaxError as error:
        raise GraphError(f"{error.filename or place}:{error.lineno or 0}: {error.msg}") from error
    except (GraphError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # somebody else's code: it may raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModuleFailed(f"{_raised_at(error)}: {words}") from error
    if not attribute:
        return build_graph(_only_root(module, spec), module.__name__)
    root = getattr(module, attribute, None)
    if root is None:
        names = [name for name, value in vars(module).items() if is_service(value)]
        raise GraphError(f"{place} has no {attribute!r}; its services are {', '.join(names) or 'none'}")
    if not is_service(root):
        raise GraphError(f"{spec} is not a @service")
    return build_graph(root, module.__name__)


def _import(place: str, directory: Path) -> ModuleType:
    if place.endswith(".py"):
        path = (directory / place).resolve()
        if not path.is_file():
            raise GraphError(f"no such file: {place}")
        if path.is_relative_to(directory):
            dotted = ".".join(path.relative_to(directory).with_suffix("").parts)
            if all(part.isidentifier() for part in dotted.split(".")):
                return importlib.import_module(dotted)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise GraphError(f"no module {place!r} below {directory.name}/ or on the Python path") from error
        raise


def _raised_at(error: BaseException) -> str:
    """The last line of the user's on the way to an error: those of libraries, and of this one, are no news to him."""
    libraries = [str(Path(__file__).resolve().parent.parent)]
    libraries += [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    others = ("<", *(f"{place}{os.sep}" for place in libraries))
    lines = traceback.extract_tb(error.__traceback__)
    last = next((one for one in reversed(lines) if not one.filename.startswith(others)), lines[-1])
    return f"{last.filename}:{last.lineno}"


def _only_root(module: ModuleType, spec: str) -> type:
    services = list({value for value in vars(module).values() if is_service(value)})
    reached: set[type] = set()
    linked = [one for one in services if any(origin == module.__name__ for origin, _, _ in info_of(one).links)]
    for one in services:
        if linked:
            reached |= {target for origin, _, target in info_of(one).links if origin == module.__name__}
        else:
            reached |= {d.on for d in info_of(one).dependencies.values() if d.on is not None}
    roots = [one for one in (linked or services) if one not in reached]
    if len(roots) != 1:
        found = ", ".join(sorted(one.__name__ for one in roots)) or "none"
        raise GraphError(f"{spec} has not one root service but: {found}; name it as {spec}:Service")
    return roots[0]
