# SPDX-License-Identifier: Apache-2.0
"""What a worker that is added may have: bounds, GPUs, ports. Whole graphs: test_control.py, test_shrinking.py."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import pytest

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.gpus import Share
from dynamo_epd.sdk.scaling import (
    MAX_WORKERS,
    Scaling,
    ScalingRefused,
    SystemPorts,
    bounds_of,
    free_share,
    split_assignments,
)
from dynamo_epd.sdk.serve import MOST_SYSTEM_PORT, Plan, make_plan, slots_of
from dynamo_epd.sdk.supervisor import Slot


class SupervisorThatStartsNothing:
    """A double: keeps slots, and ends one when it is told to."""

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        self.stopping = False
        self.may_end = asyncio.Event()

    async def start(self, slot: Slot) -> None:
        slot.ready = True
        self.slots[slot.name] = slot

    async def remove(self, slot: Slot) -> None:
        slot.ending = asyncio.ensure_future(self.may_end.wait())
        await slot.ending
        del self.slots[slot.name]


def plan_of(monkeypatch: pytest.MonkeyPatch, gpus: str = "", **overrides: str) -> Plan:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    arguments = argparse.Namespace(
        graph="tests/toys/scaled.py:Front",
        file=None,
        service_name=None,
        depends=[],
        port=0,
        host="127.0.0.1",
        working_dir=None,
        dry_run=False,
        verbose=False,
    )
    dotted = [(name.split("__")[0], ".".join(name.split("__")[1:]), value) for name, value in overrides.items()]
    return make_plan(arguments, dotted)


async def running(plan: Plan, shown: list[str], first_port: int = 20000) -> tuple[Scaling, SupervisorThatStartsNothing]:
    supervisor: Any = SupervisorThatStartsNothing()
    ports = SystemPorts(first_port)
    for slot in slots_of(plan, ports):
        await supervisor.start(slot)
    return Scaling(plan, supervisor, ports, shown.append), supervisor


def environments(supervisor: SupervisorThatStartsNothing, key: str) -> dict[str, str]:
    return {name: slot.environment[key] for name, slot in supervisor.slots.items() if name.startswith("Busy")}


def test_a_worker_keeps_index_port_and_card_until_it_has_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch, "4,5,6", Busy__ServiceArgs__resources__gpu="1")

    async def grow_and_shrink() -> None:
        shown: list[str] = []
        scaling, supervisor = await running(plan, shown)
        assert await scaling.resize("Busy", 3, "a test") == 1
        first = environments(supervisor, "DYN_SYSTEM_PORT")
        assert sorted(environments(supervisor, "CUDA_VISIBLE_DEVICES").values()) == ["4", "5", "6"]
        assert len(set(first.values())) == 3
        assert await scaling.resize("Busy", 2, "a test") == 3
        await asyncio.sleep(0)
        assert [one["leaving"] for one in scaling.status()["Busy"]] == [False, False, True]
        with pytest.raises(ScalingRefused, match=r"too few GPUs: Busy-3 finds none left; a worker that drains"):
            await scaling.resize("Busy", 3, "a test")
        supervisor.may_end.set()
        await asyncio.sleep(0.01)
        assert "Busy-2 has left" in shown
        assert await scaling.resize("Busy", 3, "a test") == 2
        assert environments(supervisor, "DYN_SYSTEM_PORT") == first
        assert environments(supervisor, "CUDA_VISIBLE_DEVICES")["Busy-2"] == "6"
        assert shown.count("Busy: 2 → 3 workers (a test)") == 1

    asyncio.run(grow_and_shrink())


def test_who_is_not_ready_leaves_before_who_serves_and_leaves_its_place_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(monkeypatch, "4,5,6,7", Busy__ServiceArgs__resources__gpu="1", Busy__ServiceArgs__workers="4")

    async def shrink_and_grow() -> None:
        scaling, supervisor = await running(plan, [])
        ports, cards = (environments(supervisor, key) for key in ("DYN_SYSTEM_PORT", "CUDA_VISIBLE_DEVICES"))
        assert sorted(cards.values()) == ["4", "5", "6", "7"]
        supervisor.may_end.set()
        for dead, count, left in (([0, 2], 3, [0, 1, 3]), ([0], 1, [1])):
            for index in dead:
                supervisor.slots[f"Busy-{index}"].ready = False
            await scaling.resize("Busy", count, "a test")
            await asyncio.sleep(0.01)
            assert [one["index"] for one in scaling.status()["Busy"]] == left
        assert await scaling.resize("Busy", 4, "a test") == 1
        assert [one["index"] for one in scaling.status()["Busy"]] == [0, 1, 2, 3]
        assert environments(supervisor, "DYN_SYSTEM_PORT") == ports
        assert environments(supervisor, "CUDA_VISIBLE_DEVICES") == cards

    asyncio.run(shrink_and_grow())


def test_what_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch, "4,5", Busy__ServiceArgs__resources__gpu="1", Planner__stages__Calm="{min: 0, max: 2}")

    async def ask() -> None:
        scaling, supervisor = await running(plan, [])
        before = scaling.status()
        for service, count, message in (
            ("Busy", 3, "too few GPUs: Busy-2 finds none left"),
            ("Busy", 0, r"Busy keeps at least 1 of its workers: Planner\.stages\.Busy\.min"),
            ("Calm", 3, r"Calm may have at most 2 workers: Planner\.stages\.Calm\.max"),
            ("Planner", 1, "Planner does not run here; there is Front, Calm, Busy"),
        ):
            with pytest.raises(ScalingRefused, match=message) as refused:
                await scaling.resize(service, count, "a test")
            assert "\n" not in str(refused.value)
        assert scaling.status() == before
        assert await scaling.resize("Calm", 0, "a test") == 1  # the configuration says so
        supervisor.stopping = True
        with pytest.raises(ScalingRefused, match="is being stopped"):
            await scaling.resize("Busy", 1, "a test")

    asyncio.run(ask())


def test_without_a_port_for_each_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers and the first of two more take all that the runtime reads."""
    plan = plan_of(monkeypatch)

    async def ask() -> None:
        scaling, supervisor = await running(plan, [], MOST_SYSTEM_PORT - 3)
        before = scaling.status()
        with pytest.raises(ScalingRefused, match=f"no free system port from 32764 to {MOST_SYSTEM_PORT}"):
            await scaling.resize("Busy", 3, "a test")
        assert scaling.status() == before
        assert await scaling.resize("Busy", 2, "a test") == 1, "the one that was left was given back"
        assert environments(supervisor, "DYN_SYSTEM_PORT")["Busy-1"] == str(MOST_SYSTEM_PORT)

    asyncio.run(ask())


def test_after_a_worker_that_did_not_come_up_there_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch)

    async def fail() -> None:
        scaling, supervisor = await running(plan, [])
        await scaling.resize("Busy", 2, "a test")
        slot = supervisor.slots.pop("Busy-1")
        scaling.gave_up(slot)
        with pytest.raises(ScalingRefused, match="a worker of Busy did not come up"):
            await scaling.resize("Busy", 2, "a test")
        assert await scaling.resize("Calm", 2, "a test") == 1

    asyncio.run(fail())


def test_bounds_are_the_planners_whether_it_runs_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch, Planner__stages__Busy__max="4")
    assert bounds_of(plan, "Busy") == (1, 4)
    assert bounds_of(plan, "Calm") == (1, MAX_WORKERS)
    assert bounds_of(plan, "Planner") == (1, 1)


def test_free_share_fills_shared_cards_first_and_never_a_whole_one() -> None:
    held = {"a-0": Share(("0",)), "b-0": Share(("1",), 0.5)}
    assert free_share(0.5, ["0", "1", "2"], held) == Share(("1",), 0.5)
    assert free_share(0.6, ["0", "1", "2"], held) == Share(("2",), 0.6)
    assert free_share(1, ["0", "1", "2"], held) == Share(("2",))
    assert free_share(2, ["0", "1", "2"], held) is None
    assert free_share(0.6, ["0", "1"], held) is None


def test_ports_are_in_a_row_or_any_free_ones_and_come_back() -> None:
    ports = SystemPorts(20000)
    assert [ports.take("a"), ports.take("b"), ports.take("c")] == [20000, 20001, 20002]
    ports.give_back("b")
    assert ports.take("d") == 20001
    free = SystemPorts(None)
    found = {free.take(str(number)) for number in range(5)}
    assert len(found) == 5
    assert max(found) < 2**15, "the runtime reads no higher ones"


@pytest.mark.parametrize("text", ["Busy", "Busy=", "=3", "Busy=-1", "Busy=1.5", "Busy=99999", "Busy=³"])
def test_what_is_no_number_of_workers_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be Service=N"):
        split_assignments(["Calm=2", text])
