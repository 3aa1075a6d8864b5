# SPDX-License-Identifier: Apache-2.0
"""`ServiceConfig` answers as the old SDK's did."""

from __future__ import annotations

import json

import pytest

from dynamo.sdk.lib.config import ServiceConfig


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ServiceConfig:
    values = {"Worker": {"model": "m", "eager": True, "lazy": False, "vllm-depth": 2, "limits": {"image": 4}}}
    values["Worker"]["ServiceArgs"] = {"workers": 2}
    monkeypatch.setenv("DYNAMO_SERVICE_CONFIG", json.dumps(values))
    monkeypatch.setattr(ServiceConfig, "_instance", None)
    return ServiceConfig.get_instance()


def test_it_is_a_dict_read_once(config: ServiceConfig) -> None:
    assert config.get("Worker", {})["model"] == "m"
    assert config.get("Nobody", {}) == {}
    assert ServiceConfig.get_instance() is config


def test_required_keys(config: ServiceConfig) -> None:
    assert config.require("Worker", "model") == "m"
    with pytest.raises(ValueError, match=r"Worker\.port must be specified"):
        config.require("Worker", "port")


def test_arguments(config: ServiceConfig) -> None:
    expected = ["--model", "m", "--eager", "--vllm-depth", "2", "--limits", '{"image": 4}']
    assert config.as_args("Worker") == expected
    assert config.as_args("Worker", prefix="vllm-") == ["--depth", "2"]
    assert config.as_args("Nobody") == []
