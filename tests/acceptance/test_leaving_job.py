# SPDX-License-Identifier: Apache-2.0
"""An image worker that leaves a running graph in the middle of a job."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx

from dynamo_epd.sdk.control import ask as control
from tests.serving import eventually, serve, untrained
from tests.test_image_worker import CONFIG, STAR
from tests.toys.calling import door

JOB = {"prompt": STAR, "n": 10, "num_inference_steps": 100}
"""So long that it is far from done when its worker is told to leave."""


def test_a_worker_that_leaves_finishes_its_job(tmp_path: Path) -> None:
    """Each worker has one. The one that stays makes no picture of the other's; in the end it is alone."""
    untrained("pixart")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    with serve("tests.toys.picturing:Frontend", str(config)) as graph:

        def steps(index: int) -> float:
            return graph.metrics("ImageWorker", index).total("epd_denoise_step_seconds_count")

        def stored() -> float:
            return graph.metrics("ImageWorker").total("epd_images_stored_total")

        def states() -> list[dict[str, Any]]:
            return [httpx.get(f"{graph.url}/v1/images/jobs/{id}", timeout=30).json() for id in ids]

        accepted = [httpx.post(f"{graph.url}/v1/images/jobs", json=JOB, timeout=30) for _ in range(2)]
        ids = [reply.json()["id"] for reply in accepted]
        eventually(lambda: steps(0) and steps(1), "each has a job")
        asyncio.run(control(door(graph.state), do="scale", service="ImageWorker", workers=1))
        assert [one["status"] for one in states()] == ["in_progress"] * 2
        eventually(lambda: set(graph.workers("ImageWorker")) == {0}, "the second has left", 60)
        eventually(lambda: [one["status"] for one in states()] == ["completed"] * 2, "both are done", 60)
        assert stored() == JOB["n"]
