# SPDX-License-Identifier: Apache-2.0
"""Jobs while the disk under NATS is full. Their pictures' disk: test_image_worker_alone.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd.errors import StageUnavailable
from tests.small_disk import small_disk
from tests.test_jobs import Server, nothing, over, queue, submitted

LONG = "a red star " * 2000
"""A prompt."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as path:
        yield path


@pytest.fixture
def server(disk: Path) -> Iterator[Any]:
    found = Server(disk)
    yield found
    found.kill()


def test_a_full_disk_refuses_what_comes_and_loses_nothing_that_was_accepted(
    server: Any, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-server leaves JetStream off once it could not write: what was accepted waits until it is started again."""
    monkeypatch.setattr("dynamo_epd.jobs.REQUEST_SECONDS", 1.0)

    async def scenario() -> None:
        async with queue(server) as front:
            accepted = [await submitted(front, f"job {index}") for index in range(3)]
            with suppress(OSError):  # no space left
                (disk / "other").write_bytes(bytes(16 << 20))

            async def submit_more() -> None:
                for index in range(10):  # the first ones may find room in pages that are there
                    accepted.append(await submitted(front, f"{index} {LONG}"))

            with pytest.raises(StageUnavailable, match="the job queue does not answer"):
                await submit_more()
            (disk / "other").unlink()
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            async with queue(server) as worker:
                worker.work(nothing)
                ended = [await over(front, job.id) for job in accepted]
                assert {state.status for state in ended} == {"completed"}
                assert (await over(front, (await submitted(front, "the next")).id)).status == "completed"

    asyncio.run(asyncio.wait_for(scenario(), 120))
