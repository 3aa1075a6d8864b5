# SPDX-License-Identifier: Apache-2.0
"""Writes docs/configuration.md: every key that a service reads beside vLLM's own, as its dataclass has it.

python -m tools.reference > docs/configuration.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import typing
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from components.decode_worker import DecodeWorker
from components.embed_worker import EmbedWorker
from components.encode_worker import EncodeWorker
from components.frontend import Frontend
from components.image_worker import ImageWorker
from components.planner import CONCURRENCY, Planner
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from dynamo_epd.planning.policy import Limits
from dynamo_epd.sdk.config import ENGINE_FIELD
from dynamo_epd.sdk.service import info_of

SERVICES = (Frontend, Processor, EncodeWorker, PrefillWorker, DecodeWorker, ImageWorker, EmbedWorker, Planner)


HEAD = """# Configuration

One YAML file: a section for each service, and `Common`. A service takes a key of `Common` where its own
`common-configs` lists it; its own value wins. On the command line `--Service.key=value` wins over both. A key that
nothing reads is an error that names the line and the nearest key there is.

`Processor`, `EncodeWorker`, `PrefillWorker` and `DecodeWorker` also take vLLM's engine arguments by their names
(`model`, `dtype`, `max-model-len`, `limit-mm-per-prompt`, …), of which `model` must be given.

Every section may have `ServiceArgs`, which is about its processes:

| key | what |
|---|---|
| `workers` | how many there are |
| `resources` | `gpu` of each worker (a fraction shares a card), `cpu` and `memory` for Kubernetes |
| `envs` | environment variables, as a mapping or as a list of `{name, value}` |
| `dynamo` | `enabled`; `namespace` and `name` to be found under; `component_type`, which Dynamo's operator reads |
"""
TAIL = """This page is written from the dataclasses by `python -m tools.reference`.
"""


def page() -> Iterator[str]:
    """The Markdown, line by line."""
    yield from HEAD.splitlines()
    shared: dict[str, list[str]] = {}
    kinds: dict[str, type] = {}
    for service in SERVICES:
        for name, kind in _sections_of(_config_of(service)):
            if kind.__module__ != _config_of(service).__module__:
                shared.setdefault(name, []).append(service.__name__)
                kinds[name] = kind
    for service in SERVICES:
        yield from ("", f"## {service.__name__}", "", *_table(_config_of(service), skip=shared))
    guesses = ", ".join(f"{guess} of `{service}`" for service, guess in CONCURRENCY.items())
    stages = (
        f"By service: `stages: {{EncodeWorker: {{max: 4}}}}`. Without `concurrency` it is a guess: {guesses}, else 1."
    )
    yield from ("", "## Planner.stages", "", stages, "", *_table(Limits))
    for name, services in shared.items():
        of = " and ".join(f"`{one}`" for one in services)
        yield from (
            "",
            f"## {name}",
            "",
            f"Of {of}. {_summary(kinds[name])}".strip(),
            "",
            *_table(kinds[name], f"{name}."),
        )
    yield from ("", *TAIL.splitlines())


def _table(kind: type, above: str = "", skip: Collection[str] = ()) -> Iterator[str]:
    yield from ("| key | default | what |", "|---|---|---|")
    yield from _rows(kind, above, skip)


def _rows(kind: type, above: str, skip: Collection[str]) -> Iterator[str]:
    said, nested = _said_by(kind), dict(_sections_of(kind))
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if name in skip:
            yield f"| `{above}{name}` | | see [{name}](#{name}) |"
        elif name in nested:
            yield f"| `{above}{name}` | {_default_of(field, section=True)} | {_summary(nested[name])} |"
            yield from _rows(nested[name], f"{above}{name}.", ())
        elif field.name != ENGINE_FIELD:
            yield f"| `{above}{name}` | {_default_of(field)} | {said[field.name]} |"


def _config_of(service: type) -> type:
    config = info_of(service).config
    assert config is not None
    return config


def _sections_of(kind: type) -> Iterator[tuple[str, type]]:
    """Fields of a dataclass that are dataclasses themselves."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for one in (hints[field.name], *typing.get_args(hints[field.name])):
            if isinstance(one, type) and dataclasses.is_dataclass(one):
                yield field.name.replace("_", "-"), one


def _summary(kind: type) -> str:
    return _plain(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0])


def _said_by(kind: type) -> dict[str, str]:
    """The string below each field of a class. Raises KeyError later, for a field that has none."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: _plain(str(ast.literal_eval(below.value)))
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr)
    }


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def _default_of(field: dataclasses.Field[Any], *, section: bool = False) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "must be given"
        value = None if section else field.default_factory()
    if value is None or value == "":
        return ""
    if "bytes" in field.name and value % (1 << 20) == 0:
        return f"{value} ({value >> 20} MiB)"
    return (
        f"`{json.dumps(value)}`"
        if isinstance(value, bool | tuple | dict)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    print("\n".join(page()))
