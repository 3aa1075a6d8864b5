# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the graph at scale, at a toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scale


def test_a_crowd_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three workers in one process, behind the real frontend, processor and NATS, with pictures over NIXL."""
    loads = ["--workers", "3", "--processes", "1", "--streams", "1", "2", "--images", "0", "2", "--seconds", "1"]
    assert scale.main([*loads, "--output", str(tmp_path)]) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "scale.json").read_text())
    assert [(one["streams"], one["images"]) for one in found["points"]] == [(8, 0), (1, 0), (2, 0), (8, 2)]
    for one in found["points"]:
        assert one["requests"] and not one["failed"]
        assert min(one["added_first"]) > -0.001, "an answer takes what its engine takes, at least"
        assert one["requests_a_second"] <= one["allowed"]
        assert {"Frontend", "Processor", "CrowdWorker", "nats-server", "the clients"} <= set(one["cores"])
    assert found["wall"] in capsys.readouterr().out
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
