# SPDX-License-Identifier: Apache-2.0
"""Whom Prometheus is told of. With real graphs and a real Prometheus: test_observability.py."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from deploy.observability import targets
from tests.exporters import DoorThatAnswers

NOBODY = 2**22 + 1
"""Above the largest process id."""


def worker(index: int, *, ready: bool = True, leaving: bool = False) -> dict[str, Any]:
    return {"index": index, "ready": ready, "leaving": leaving, "metrics": f"http://127.0.0.1:{20000 + index}/metrics"}


def test_a_worker_is_named_from_its_first_readiness_until_it_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    records = tmp_path / "dynamo" / "graphs"
    records.mkdir(parents=True)
    known, double = targets.Targets(), DoorThatAnswers()
    found: list[list[str]] = []

    async def look(*workers: dict[str, Any]) -> None:
        double.services = {"Busy": list(workers), "Rests": [worker(7) | {"metrics": None}]}
        found.append([group["labels"]["worker"] for group in await known.look()])

    async def looks() -> None:
        async with double.open(tmp_path / "control") as path:
            record = json.dumps({"graph": "g:Front", "socket": str(path)})
            (records / f"{os.getpid()}.json").write_text(record)
            (records / f"{NOBODY}.json").write_text(record)
            (records / "1.json").write_text("{")  # of a live process, and half written
            await look(worker(0), worker(1, ready=False))
            assert await known.look() == [
                {
                    "targets": ["127.0.0.1:20000"],
                    "labels": {"graph": "g:Front", "dynamo_component": "Busy", "worker": "Busy-0"},
                }
            ]
            await look(worker(0, ready=False), worker(1))  # the first one has died
            await look(worker(0), worker(1, leaving=True))
            await look(worker(0), worker(1, ready=False))  # grown again
        await look()  # nobody answers at the door
        (records / f"{os.getpid()}.json").unlink()
        await look()

    asyncio.run(looks())
    assert found == [["Busy-0"], ["Busy-0", "Busy-1"], ["Busy-0"], ["Busy-0"], ["Busy-0"], []]


def test_a_state_that_cannot_be_made_holds_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only() -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(targets, "state_dir", read_only)
    assert asyncio.run(targets.Targets().look()) == []


def test_the_file_is_replaced_as_a_whole_when_the_answer_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "below" / "targets.json"

    async def kept() -> None:
        keeping = asyncio.create_task(targets.keep(file))
        async with asyncio.timeout(30):
            while not file.exists():
                await asyncio.sleep(0.01)
        keeping.cancel()
        await asyncio.wait([keeping])

    asyncio.run(kept())
    assert json.loads(file.read_text()) == []
    assert [one.name for one in file.parent.iterdir()] == ["targets.json"]
