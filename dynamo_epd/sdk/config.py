# SPDX-License-Identifier: Apache-2.0
"""From YAML and ``--Service.key=value`` to what each service gets, in two hops: text → checked values → dataclass.

Precedence: command line > YAML > decorator. Every key knows where it was written, so that an unknown one can be named
with file, line and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any

import msgspec
import yaml

from dynamo_epd.sdk.engine_args import engine_arg_names
from dynamo_epd.sdk.graph import Graph
from dynamo_epd.sdk.service import ServiceInfo, info_of

COMMON = "Common"
COMMON_CONFIGS = "common-configs"
SERVICE_ARGS = "ServiceArgs"
PLANNER = "Planner"
ENGINE_FIELD = "engine_args"
OVERRIDE = re.compile(r"--(?P<service>[A-Za-z_]\w*)\.(?P<key>[^=\s]+)(?:=(?P<value>.*))?", re.DOTALL)


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the place and, where one is near, the known name."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that also takes ``1e-3`` for a number, which YAML 1.1 would leave a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Document:
    """Nested values plus, for each path of keys, the place that it was written at."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._places: dict[tuple[str, ...], str] = {}

    def place(self, *path: str) -> str:
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, "the configuration")

    def read(self, file: str | Path) -> None:
        """Adds a YAML file. Raises ConfigError when it cannot be read as one."""
        try:
            text = Path(file).read_text(encoding="utf-8")
            node = _composed(text)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(_unreadable(str(file), error)) from error
        if node is None:
            return
        self.values = self._node(node, str(file), ())
        for name, section in self.values.items():
            if section is None:
                self.values[name] = {}
            elif not isinstance(section, dict):
                raise ConfigError(f"{self.place(name)}: {name} must hold keys, not {section!r}")

    def _node(self, node: yaml.Node, file: str, path: tuple[str, ...]) -> Any:
        if not isinstance(node, yaml.MappingNode):
            if not path:
                raise ConfigError(f"{file}:{node.start_mark.line + 1}: the top level must be service names")
            loader = _Loader("")
            try:
                return loader.construct_document(node)
            except yaml.YAMLError as error:
                raise ConfigError(_unreadable(file, error)) from error
            except ValueError as error:  # of a date that there is not
                raise ConfigError(f"{file}:{node.start_mark.line + 1}: {error}") from error
            finally:
                loader.dispose()
        found: dict[str, Any] = {}
        merge = _Loader("")
        try:
            merge.flatten_mapping(node)
        except yaml.YAMLError as error:
            raise ConfigError(_unreadable(file, error)) from error
        finally:
            merge.dispose()
        for key_node, value_node in node.value:
            key = str(key_node.value)
            place = f"{file}:{key_node.start_mark.line + 1}"
            if key in found:
                raise ConfigError(f"{place}: {key} is given twice")
            self._places[*path, key] = place
            found[key] = self._node(value_node, file, (*path, key))
        return found

    def override(self, service: str, dotted: str, text: str) -> None:
        """Sets one value from the command line. Siblings survive. ``text`` is read as a YAML scalar."""
        place = f"--{service}.{dotted}"
        try:
            _composed(text)
            value = yaml.load(text, Loader=_Loader) if text else ""
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{place}: {text!r} is not a value: {_in_one_line(error)}") from error
        path = (service, *dotted.split("."))
        section = self.values
        for key in path[:-1]:
            key = _same_key(section, key)
            below = section.get(key)
            if below is None:
                below = section[key] = {}
            if not isinstance(below, dict):
                raise ConfigError(f"{place}: {key} holds a value, not keys")
            section = below
        section[_same_key(section, path[-1])] = value
        self._places[path] = place


def _composed(text: str) -> yaml.Node | None:
    """Raises YAMLError for what cannot be read, an alias within what it stands for among it."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _refuse_circles(node, set(), set())
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    return node


def _refuse_circles(node: yaml.Node, above: set[int], known: set[int]) -> None:
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="it holds itself", problem_mark=node.start_mark)
    if id(node) in known or isinstance(node, yaml.ScalarNode):
        return
    known.add(id(node))
    above.add(id(node))
    for below in node.value:
        for one in below if isinstance(below, tuple) else (below,):
            _refuse_circles(one, above, known)
    above.discard(id(node))


def _unreadable(file: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{file}:{mark.line + 1}" if mark else file
    return f"{place}: {_in_one_line(error)}"


def _in_one_line(error: Exception) -> str:
    """PyYAML's own text has a line for each of them, and shows the place in between."""
    told = [getattr(error, name, None) for name in ("context", "problem")]
    return " ".join((", ".join(filter(None, told)) or str(error)).split())


def _same_key(section: dict[str, Any], key: str) -> str:
    """``key`` as the section already spells it (kebab or snake case)."""
    return next((known for known in section if _snake(known) == _snake(key)), key)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Takes ``--Service.key=value`` and ``--Service.key value`` out of a command line.

    Returns the other arguments and (service, dotted key, text) triples. A value may start with ``-``.
    """
    rest: list[str] = []
    found: list[tuple[str, str, str]] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        match = OVERRIDE.fullmatch(argument)
        if not match:
            rest.append(argument)
            continue
        value = match["value"]
        if value is None:
            if not left or OVERRIDE.fullmatch(left[0]):
                raise ConfigError(f"{argument} needs a value")
            value = left.pop(0)
        found.append((match["service"], match["key"], value))
    return rest, found


@dataclasses.dataclass(frozen=True)
class ServiceSettings:
    """One service, resolved. ``values`` are its keys as written; ``config`` is its dataclass, or None without one."""

    name: str
    namespace: str
    component: str
    workers: int
    resources: dict[str, Any]
    resources_configured: bool
    envs: dict[str, str]
    dynamo: dict[str, Any]
    values: dict[str, Any]
    config: Any
    runs: bool

    @property
    def address(self) -> tuple[str, str]:
        return self.namespace, self.component

    def as_section(self) -> dict[str, Any]:
        """The section that a worker is given: reading it again resolves to the same settings."""
        service_args = {
            "workers": self.workers,
            "resources": self.resources,
            "envs": [{"name": name, "value": value} for name, value in self.envs.items()],
            "dynamo": {"namespace": self.namespace, "name": self.component} | self.dynamo,
        }
        return {**self.values, SERVICE_ARGS: service_args}


def resolve(graph: Graph, document: Document) -> dict[str, ServiceSettings]:
    """Checks the whole document against the graph. Raises ConfigError for the first thing that nothing reads."""
    known = [*graph.services, COMMON, *([] if PLANNER in graph.services else [PLANNER])]
    for name in document.values:
        if name not in known:
            raise ConfigError(f"{document.place(name)}: {_unknown('service', name, known)}")
    if PLANNER not in graph.services:
        _check_absent_planner(document)
    common = document.values.get(COMMON, {})
    taken: set[str] = set()
    settings: dict[str, ServiceSettings] = {}
    for name, cls in graph.services.items():
        info = info_of(cls)
        section = dict(document.values.get(name, {}))
        places = {key: document.place(name, key) for key in section}
        for key in _common_keys(document, name, section.pop(COMMON_CONFIGS, [])):
            if key not in common:
                raise ConfigError(
                    f"{document.place(name, COMMON_CONFIGS)}: {_unknown('key of Common', key, list(common))}"
                )
            taken.add(key)
            if _same_key(section, key) not in section:
                section[key] = common[key]
                places[key] = document.place(COMMON, key)
        service_args = section.pop(SERVICE_ARGS, None) or {}
        settings[name] = _settings(info, name, section, service_args, document, places)
    for key in common:
        if key not in taken:
            raise ConfigError(
                f"{document.place(COMMON, key)}: no service takes {key} from Common (list it in {COMMON_CONFIGS})"
            )
    for stage in getattr(settings[PLANNER].config, "stages", {}) if PLANNER in settings else {}:
        if stage not in settings:
            raise ConfigError(f"{document.place(PLANNER, 'stages', stage)}: {_unknown('service', stage, known)}")
    for name, one in settings.items():
        # vLLM would take one of its own choice, and fetch it.
        if one.runs and info_of(graph.services[name]).engine_args and "model" not in getattr(one.config, ENGINE_FIELD):
            raise ConfigError(_missing(document, name, ["model"]))
    return settings


def _check_absent_planner(document: Document) -> None:
    section = document.values.get(PLANNER, {})
    for key, value in section.items():
        if key == SERVICE_ARGS:
            continue
        if _snake(key) != "no_operation":
            raise ConfigError(f"{document.place(PLANNER, key)}: {_unknown('key of Planner', key, ['no-operation'])}")
        if value is not True:
            raise ConfigError(f"{document.place(PLANNER, key)}: this graph has no Planner to switch on")


def _common_keys(document: Document, name: str, keys: Any) -> list[str]:
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ConfigError(f"{document.place(name, COMMON_CONFIGS)}: {COMMON_CONFIGS} must be a list of keys")
    return keys


class _Resources(msgspec.Struct, forbid_unknown_fields=True):
    cpu: int | float | str | None = None
    memory: int | str | None = None
    gpu: int | float | str | None = None


class _Dynamo(msgspec.Struct, forbid_unknown_fields=True):
    enabled: bool | None = None
    name: str | None = None
    namespace: str | None = None
    component_type: str | None = None


class _ServiceArgs(msgspec.Struct, forbid_unknown_fields=True):
    workers: typing.Annotated[int, msgspec.Meta(ge=0)] | None = None
    resources: _Resources | None = None
    envs: list[dict[str, typing.Any]] | dict[str, typing.Any] | None = None
    dynamo: _Dynamo | None = None


def _settings(
    info: ServiceInfo,
    name: str,
    section: dict[str, Any],
    service_args: dict[str, Any],
    document: Document,
    places: dict[str, str],
) -> ServiceSettings:
    if not isinstance(service_args, dict):
        raise ConfigError(f"{document.place(name, SERVICE_ARGS)}: {SERVICE_ARGS} must hold keys")
    for key in service_args:
        if key not in _ServiceArgs.__struct_fields__:
            known = list(_ServiceArgs.__struct_fields__)
            raise ConfigError(
                f"{document.place(name, SERVICE_ARGS, key)}: {_unknown(f'{SERVICE_ARGS} key', key, known)}"
            )
    try:
        given = msgspec.convert(service_args, _ServiceArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{document.place(name, SERVICE_ARGS)}: {name}.{SERVICE_ARGS}: {error}") from error
    resources = _without_none(msgspec.to_builtins(given.resources)) if given.resources else {}
    dynamo = _without_none(msgspec.to_builtins(given.dynamo)) if given.dynamo else {}
    config = _configured(info, name, section, document, places)
    enabled = dynamo.pop("enabled", info.enabled)
    return ServiceSettings(
        name=name,
        namespace=dynamo.pop("namespace", info.namespace),
        component=dynamo.pop("name", info.name),
        workers=info.workers if given.workers is None else given.workers,
        resources=info.resources | resources,
        resources_configured="gpu" in resources,
        envs=_envs(info.envs) | _envs(_complete(given.envs or {}, document.place(name, SERVICE_ARGS, "envs"))),
        dynamo=dynamo | ({} if enabled else {"enabled": False}),
        values=section,
        config=config,
        runs=enabled and (info.runs_if is None or info.runs_if(config)),
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _complete(given: Any, where: str) -> Any:
    for entry in given if isinstance(given, list) else []:
        if set(entry) != {"name", "value"}:
            raise ConfigError(f"{where}: an entry of envs has name and value, and nothing else")
    return given


def _envs(given: Any) -> dict[str, str]:
    """Old graphs declare names without a value, which the environment is to give: nothing is set for them."""
    if isinstance(given, dict):
        return {str(key): str(value) for key, value in given.items()}
    return {str(entry["name"]): str(entry["value"]) for entry in given if "name" in entry and "value" in entry}


def _configured(
    info: ServiceInfo, name: str, section: dict[str, Any], document: Document, places: dict[str, str]
) -> Any:
    if info.config is None:
        return None
    fields = _fields(info.config)
    engine_names = engine_arg_names() if info.engine_args else frozenset()
    own: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for key, value in section.items():
        snake = _snake(key)
        where = places.get(key) or document.place(name, key)
        if snake in own or snake in engine:
            raise ConfigError(f"{where}: {key} is given twice")
        if snake in fields and not (info.engine_args and snake == ENGINE_FIELD):
            own[snake] = _nested(fields[snake], value, document, (name, key), where)
        elif snake in engine_names or (info.engine_args and not engine_names):
            engine[snake] = value
        else:
            known = [_kebab(field) for field in [*fields, *engine_names] if field != ENGINE_FIELD]
            raise ConfigError(f"{where}: {_unknown(f'key of {name}', key, [*known, SERVICE_ARGS, COMMON_CONFIGS])}")
    for key, value in own.items():
        where = next(place for written, place in places.items() if _snake(written) == key)
        try:
            own[key] = msgspec.convert(value, fields[key], dec_hook=_path)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {name}.{_kebab(key)}: {error}") from error
    if info.engine_args:
        own[ENGINE_FIELD] = engine
    if missing := [key for key in _required(info.config) if key not in own]:
        raise ConfigError(_missing(document, name, missing))
    try:
        return info.config(**own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{document.place(name)}: {name}: {error}") from error


def _fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _required(kind: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is field.default_factory is dataclasses.MISSING
    ]


def _missing(document: Document, name: str, keys: list[str]) -> str:
    written = [_kebab(key) for key in keys]
    where = f"in the file of -f or as --{name}.{written[0]}=…"
    return f"{document.place(name)}: {name}: {', '.join(written)} must be given, {where}"


def _nested(kind: Any, value: Any, document: Document, path: tuple[str, ...], where: str) -> Any:
    """``value`` with the kebab-case keys of nested dataclasses as field names; unknown ones refused."""
    inner = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
    if inner is None or not isinstance(value, dict):
        return value
    fields = _fields(typing.cast(type, inner))
    found: dict[str, Any] = {}
    for key, below in value.items():
        place = document.place(*path, key) if document.place(*path) == where else where
        if _snake(key) not in fields:
            raise ConfigError(f"{place}: {_unknown('key of ' + '.'.join(path), key, [_kebab(one) for one in fields])}")
        found[_snake(key)] = _nested(fields[_snake(key)], below, document, (*path, key), place)
    return found


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    # msgspec asks for this error from a hook that does not know a type.
    raise NotImplementedError(f"a field of type {kind.__name__}")


def _snake(key: str) -> str:
    return key.replace("-", "_")


def _kebab(key: str) -> str:
    return key.replace("_", "-")


def _unknown(what: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(_kebab(str(name)), known, n=1, cutoff=0.5) or difflib.get_close_matches(
        str(name), known, n=1, cutoff=0.5
    )
    hint = f"; did you mean {near[0]}?" if near else (f"; known: {', '.join(known)}" if len(known) <= 12 else "")
    return f"unknown {what} {name!r}{hint}"
