# SPDX-License-Identifier: Apache-2.0
"""YAML and overrides to what each service gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from components.embed_worker import EmbedWorker
from dynamo_epd.sdk import depends, service
from dynamo_epd.sdk.config import ConfigError, Document, ServiceSettings, resolve, split_overrides
from dynamo_epd.sdk.graph import Graph, build_graph


@dataclasses.dataclass(frozen=True)
class Media:
    max_bytes: int = 10
    allowed_hosts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    routing: str = "affinity"
    threshold: float = 0.5
    media: Media = dataclasses.field(default_factory=Media)
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.threshold > 1:
            raise ValueError("threshold must not exceed 1")


@service(config=EngineConfig, engine_args=True, workers=2, resources={"gpu": 1, "cpu": "4"})
class Worker: ...


@service
class Old:
    worker = depends(Worker)


def graph() -> Graph:
    return build_graph(Old, "nobody")


def settle(tmp_path: Path, text: str, *arguments: str) -> dict[str, ServiceSettings]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    document = Document()
    document.read(file)
    rest, overrides = split_overrides(list(arguments))
    assert rest == []
    for one in overrides:
        document.override(*one)
    return resolve(graph(), document)


def test_keys_become_fields_and_the_rest_engine_arguments(tmp_path: Path) -> None:
    text = (
        "Worker:\n  model: m\n  routing: least-loaded\n  threshold: 1e-3\n"
        "  media: {max-bytes: 5, allowed-hosts: [a, b]}\n"
        "  max-model-len: 256\n  limit-mm-per-prompt: {image: 4}\n  enforce_eager: true\n"
    )
    config = settle(tmp_path, text)["Worker"].config
    assert config == EngineConfig(
        "least-loaded",
        0.001,
        Media(5, ("a", "b")),
        {"model": "m", "max_model_len": 256, "limit_mm_per_prompt": {"image": 4}, "enforce_eager": True},
    )


def test_precedence_is_command_line_then_yaml_then_decorator(tmp_path: Path) -> None:
    assert settle(tmp_path, "Worker: {model: m}")["Worker"].workers == 2
    service_args = "{workers: 3, resources: {cpu: '8'}, envs: [{name: A, value: 1}]}"
    text = f"Worker:\n  model: m\n  routing: kv\n  ServiceArgs: {service_args}\n"
    from_yaml = settle(tmp_path, text)["Worker"]
    assert (from_yaml.workers, from_yaml.resources) == (3, {"gpu": 1, "cpu": "8"})
    assert not from_yaml.resources_configured
    overridden = settle(tmp_path, text, "--Worker.ServiceArgs.workers=4", "--Worker.routing", "affinity")["Worker"]
    assert (overridden.workers, overridden.config.routing) == (4, "affinity")
    assert (overridden.resources, overridden.envs) == ({"gpu": 1, "cpu": "8"}, {"A": "1"})  # siblings survive


def test_nested_overrides_keep_siblings_and_reach_either_spelling(tmp_path: Path) -> None:
    text = "Worker:\n  model: m\n  media: {max-bytes: 5, allowed-hosts: [a]}\n"
    config = settle(tmp_path, text, "--Worker.media.max_bytes=7")["Worker"].config
    assert config.media == Media(7, ("a",))


def test_both_forms_of_overrides_and_values_that_start_with_a_dash() -> None:
    arguments = ["-f", "x", "--A.k=v=w", "--A.b", "-1", "--A.c", "--flag", "-p", "1", "--A.d="]
    assert split_overrides(arguments) == (
        ["-f", "x", "-p", "1"],
        [("A", "k", "v=w"), ("A", "b", "-1"), ("A", "c", "--flag"), ("A", "d", "")],
    )
    for missing in (["--A.b"], ["--A.b", "--A.c=1"]):
        with pytest.raises(ConfigError, match=r"--A\.b needs a value"):
            split_overrides(missing)


def test_common_reaches_only_those_who_ask_and_own_values_win(tmp_path: Path) -> None:
    text = (
        "Common:\n  model: tiny\n  max-model-len: 64\n"
        "Old:\n  common-configs: [model]\n"
        "Worker:\n  common-configs: [model, max-model-len]\n  max_model_len: 128\n"
    )
    settings = settle(tmp_path, text)
    assert settings["Old"].values == {"model": "tiny"}
    assert settings["Worker"].config.engine_args == {"max_model_len": 128, "model": "tiny"}


def test_service_args_never_become_engine_arguments(tmp_path: Path) -> None:
    one = settle(tmp_path, "Worker:\n  model: m\n  ServiceArgs: {workers: 1, dynamo: {namespace: n}}\n")["Worker"]
    assert one.config.engine_args == {"model": "m"}
    assert one.address == ("n", "Worker")


def test_what_a_worker_is_given_resolves_to_the_same(tmp_path: Path) -> None:
    text = "Worker:\n  model: m\n  routing: kv\n  ServiceArgs: {workers: 5, envs: {A: b}, dynamo: {name: W}}\n"
    first = settle(tmp_path, text)
    document = Document()
    document.values = {name: one.as_section() for name, one in first.items()}
    again = resolve(graph(), document)
    for name, one in first.items():
        assert dataclasses.replace(again[name], resources_configured=one.resources_configured) == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Worker:\n  model: m\n  max-model-lne: 5\n",
            "c.yaml:3: unknown key of Worker 'max-model-lne'; did you mean max-model-len?",
        ),
        (
            "Worker:\n  media:\n    max-byte: 5\n",
            "c.yaml:3: unknown key of Worker.media 'max-byte'; did you mean max-bytes?",
        ),
        ("Worker:\n  threshold: high\n", "c.yaml:2: Worker.threshold: Expected `float`, got `str`"),
        (
            "Worker:\n  media: {max-bytes: x}\n",
            r"c.yaml:2: Worker.media: Expected `int`, got `str` - at `\$.max_bytes`",
        ),
        ("Worker:\n  threshold: 2.0\n", "c.yaml:1: Worker: threshold must not exceed 1"),
        ("Wroker: {}\n", "c.yaml:1: unknown service 'Wroker'; did you mean Worker?"),
        (
            "Worker:\n  ServiceArgs:\n    wrokers: 1\n",
            "c.yaml:3: unknown ServiceArgs key 'wrokers'; did you mean workers?",
        ),
        ("Worker:\n  ServiceArgs: {workers: -1}\n", "c.yaml:2: Worker.ServiceArgs: Expected `int` >= 0"),
        ("Common:\n  model: m\n", "c.yaml:2: no service takes model from Common"),
        (
            "Common:\n  model: m\nOld:\n  common-configs: [modle]\n",
            "c.yaml:4: unknown key of Common 'modle'; did you mean model?",
        ),
        ("Common:\n  modle: m\nWorker:\n  common-configs: [modle]\n", "c.yaml:2: unknown key of Worker 'modle'"),
        ("Worker:\n  model: a\n  model: b\n", "c.yaml:3: model is given twice"),
        ("Worker:\n  max-model-len: 1\n  max_model_len: 2\n", "c.yaml:3: max_model_len is given twice"),
        ("Worker:\n  engine-args: {}\n", "c.yaml:2: unknown key of Worker 'engine-args'"),
        ("Worker: {routing: kv}\n", r"c.yaml:1: Worker: model must be given, in the file of -f or as --Worker.model=…"),
        ("Worker:\n  ServiceArgs: {envs: [{name: A}]}\n", "c.yaml:2: an entry of envs has name and value"),
        ("Worker:\n  routing: 2024-13-01\n", "c.yaml:2: month must be in 1..12"),
        ("Worker:\n  model: m\n  <<: 5\n", "c.yaml:3: .*expected a mapping or list of mappings for merging"),
        ("Worker: a\x00b\n", r"c.yaml: unacceptable character #x0000: special characters are not allowed"),
        ("Worker:\n  a: [1\n  b: 2\n", r"c.yaml:3: while parsing a flow sequence, expected ',' or '\]', but got"),
        ("- a\n", "c.yaml:1: the top level must be service names"),
        ("Worker: 5\n", "c.yaml:1: Worker must hold keys"),
        ("Worker: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        ("Worker: &own\n  media: *own\n", "c.yaml:1: it holds itself"),
        ("Worker:\n  media:\n    allowed-hosts: &own [a, [*own]]\n", "c.yaml:3: it holds itself"),
        (f"Worker: {'[' * 2000}\n", "c.yaml: it is nested too deeply"),
        ("Planner: {no-operation: false}\n", "c.yaml:1: this graph has no Planner to switch on"),
    ],
)
def test_errors_name_place_and_nearest_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        settle(tmp_path, text)
    assert "\n" not in str(told.value)


def test_without_a_configuration_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the configuration: Worker: model must be given"):
        resolve(graph(), Document())
    assert settle(tmp_path, "Worker: {ServiceArgs: {dynamo: {enabled: false}}}")["Worker"].config.engine_args == {}
    with pytest.raises(ConfigError, match=r"^the configuration: EmbedWorker: model must be given"):
        resolve(build_graph(EmbedWorker, "nobody"), Document())


def test_an_override_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--Worker.max-model-lne: unknown key"):
        settle(tmp_path, "", "--Worker.max-model-lne=5")
    with pytest.raises(ConfigError, match=r"^--Worker.media.max-byte: unknown key"):
        settle(tmp_path, "", "--Worker.media.max-byte=5")
    with pytest.raises(ConfigError, match=r"^--Worker.routing.x: routing holds a value"):
        settle(tmp_path, "Worker: {routing: kv}\n", "--Worker.routing.x=5")
    with pytest.raises(ConfigError, match=r"^--Worker.routing: .* is not a value: it holds itself"):
        settle(tmp_path, "", "--Worker.routing=&own [*own]")


def test_planner_keys_are_known_to_graphs_without_a_planner(tmp_path: Path) -> None:
    assert set(settle(tmp_path, "Worker: {model: m}", "--Planner.no-operation=true")) == {"Old", "Worker"}


def test_the_planner_starts_a_process_only_where_it_is_switched_on() -> None:
    from components.planner import Planner

    quiet = resolve(build_graph(Planner, "nobody"), Document())["Planner"]
    assert quiet.config.no_operation
    assert not quiet.runs
    document = Document()
    document.values = {"Planner": {"stages": {"Worke": {"max": 2}}}}
    with pytest.raises(ConfigError, match=r"unknown service 'Worke'"):
        resolve(build_graph(Planner, "nobody"), document)
    document = Document()
    document.override("Planner", "no-operation", "false")
    assert resolve(build_graph(Planner, "nobody"), document)["Planner"].runs
