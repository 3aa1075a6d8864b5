# SPDX-License-Identifier: Apache-2.0
"""Which services a graph has, and how graph strings are read."""

from __future__ import annotations

import itertools
import sys
import textwrap
from pathlib import Path

import pytest

from dynamo_epd.sdk.graph import GraphError, load_graph
from dynamo_epd.sdk.serve import callers_first, stop_groups

_numbers = itertools.count()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of four services and two graphs over them. Its name is new each time: modules are imported once."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"toy_package_{next(_numbers)}"
    package = tmp_path / name
    package.mkdir()
    (package / "parts.py").write_text(
        textwrap.dedent("""
            from dynamo_epd.sdk import depends, service

            @service
            class Decode: ...

            @service
            class Prefill: ...

            @service
            class Processor:
                prefill = depends(Prefill)
                decode = depends(Decode)

            @service
            class Frontend:
                processor = depends(Processor)
        """)
    )
    (package / "agg.py").write_text(
        f"from {name}.parts import Decode, Frontend, Processor\nFrontend.link(Processor).link(Decode)\n"
    )
    (package / "disagg.py").write_text(
        f"from {name}.parts import Decode, Frontend, Prefill, Processor\n"
        "Frontend.link(Processor).link(Decode)\nProcessor.link(Prefill)\n"
    )
    return package


def test_unlinked_dependencies_are_pruned_and_graphs_do_not_affect_each_other(modules: Path) -> None:
    def services(which: str) -> list[str]:
        return sorted(load_graph(f"{modules.name}.{which}:Frontend", str(modules.parent)).services)

    assert services("agg") == ["Decode", "Frontend", "Processor"]
    assert services("disagg") == ["Decode", "Frontend", "Prefill", "Processor"]
    assert services("agg") == ["Decode", "Frontend", "Processor"]
    assert services("parts") == ["Decode", "Frontend", "Prefill", "Processor"]  # no link: every depends counts


def test_callers_stand_before_what_they_call(modules: Path) -> None:
    graph = load_graph(f"{modules.name}.disagg:Frontend", str(modules.parent))
    order = callers_first(graph)
    assert order[:2] == ["Frontend", "Processor"]
    assert sorted(order[2:]) == ["Decode", "Prefill"]
    assert stop_groups(graph, order) == [["Frontend"], ["Processor"], order[2:]]
    assert stop_groups(graph, ["Decode"]) == [["Decode"]]


@pytest.mark.parametrize("form", ["{name}.agg", "{name}.agg:Frontend", "{name}/agg.py", "{name}/agg.py:Frontend"])
def test_forms_of_a_graph_string(modules: Path, form: str) -> None:
    graph = load_graph(form.format(name=modules.name), str(modules.parent))
    assert graph.root.__name__ == "Frontend"
    assert len(graph.services) == 3


def test_a_file_outside_the_working_directory(modules: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    alone = tmp_path / "alone_here.py"
    alone.write_text("from dynamo_epd.sdk import service\n@service\nclass Only: ...\n")
    assert load_graph(str(alone), str(elsewhere)).root.__name__ == "Only"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{name}.nothing", "no module"),
        ("{name}.agg:Frontent", "has no 'Frontent'; its services are"),
        ("{name}.agg:__name__", "is not a @service"),
        ("{name}/nothing.py", "no such file"),
        ("{name}.two", "not one root service but: Left, Right"),
    ],
)
def test_what_a_graph_string_may_not_name(modules: Path, form: str, message: str) -> None:
    (modules / "two.py").write_text(
        "from dynamo_epd.sdk import service\n@service\nclass Left: ...\n@service\nclass Right: ...\n"
    )
    with pytest.raises(GraphError, match=message):
        load_graph(form.format(name=modules.name), str(modules.parent))


def test_an_import_error_of_the_user_is_his_own(modules: Path) -> None:
    (modules / "user.py").write_text("from json import not_there\n")
    with pytest.raises(ImportError, match="not_there"):
        load_graph(f"{modules.name}.user:X", str(modules.parent))
    (modules / "deeper.py").write_text("import absent_library.part\n")
    with pytest.raises(ModuleNotFoundError, match="absent_library"):
        load_graph(f"{modules.name}.deeper:X", str(modules.parent))
