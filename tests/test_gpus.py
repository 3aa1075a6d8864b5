# SPDX-License-Identifier: Apache-2.0
"""Sharing out pretended cards."""

from __future__ import annotations

import dataclasses

import pytest

from dynamo_epd.sdk import service
from dynamo_epd.sdk.config import ConfigError, Document, ServiceSettings, resolve
from dynamo_epd.sdk.gpus import Share, gpus_for, share_out, visible_gpus
from dynamo_epd.sdk.graph import build_graph


def test_the_parents_cards_are_the_limit() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5,GPU-ab"}) == ["2", "5", "GPU-ab"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == ["0"]


def test_whole_requests_get_cards_of_their_own() -> None:
    shares = share_out([("A-0", 1), ("A-1", 1), ("B-0", 2)], ["4", "5", "6", "7"])
    assert shares == {"A-0": Share(("4",)), "A-1": Share(("5",)), "B-0": Share(("6", "7"))}
    assert shares["B-0"].as_environment() == {"CUDA_VISIBLE_DEVICES": "6,7"}


def test_fractions_share_a_card_with_matching_memory() -> None:
    shares = share_out([("E-0", 0.5), ("P-0", 1), ("E-1", 0.5), ("E-2", 0.4)], ["0", "1", "2"])
    assert shares["P-0"].devices == ("0",)
    assert shares["E-0"].devices == shares["E-1"].devices == ("1",)
    assert shares["E-2"] == Share(("2",), 0.4)
    assert shares["E-2"].as_environment() == {"CUDA_VISIBLE_DEVICES": "2", "DYNAMO_GPU_FRACTION": "0.4"}


def test_ten_tenths_fit_one_card() -> None:
    shares = share_out([(f"E-{n}", 0.1) for n in range(10)], ["0"])
    assert {share.devices for share in shares.values()} == {("0",)}


@pytest.mark.parametrize("requests", [[("A-0", 2), ("B-0", 1)], [("A-0", 2), ("B-0", 0.5)], [("A-0", 0.6)] * 3])
def test_too_few_is_an_error(requests: list[tuple[str, float]]) -> None:
    named = [(f"{name}{number}", request) for number, (name, request) in enumerate(requests)]
    with pytest.raises(ConfigError, match=r"too few GPUs: .* visible: 2"):
        share_out(named, ["0", "1"])


def test_one_and_a_half_is_no_request() -> None:
    with pytest.raises(ConfigError, match="neither whole nor a fraction"):
        share_out([("A-0", 1.5)], ["0", "1"])


@service(resources={"gpu": 1}, workers=2)
class Wishing: ...


def settings(**resources: object) -> dict[str, ServiceSettings]:
    document = Document()
    if resources:
        document.values = {"Wishing": {"ServiceArgs": {"resources": resources}}}
    return resolve(build_graph(Wishing, "nobody"), document)


def test_a_decorators_wish_runs_on_the_cpu_where_there_is_no_card() -> None:
    assert gpus_for(settings(), []) == {}
    assert sorted(gpus_for(settings(), ["0", "1"])) == ["Wishing-0", "Wishing-1"]


def test_a_configured_order_is_an_error_there() -> None:
    with pytest.raises(ConfigError, match="too few GPUs"):
        gpus_for(settings(gpu=1), [])
    assert gpus_for(settings(gpu=0), ["0"]) == {}


def test_services_that_do_not_run_get_none() -> None:
    idle = {name: dataclasses.replace(one, runs=False) for name, one in settings(gpu=4).items()}
    assert gpus_for(idle, ["0"]) == {}
