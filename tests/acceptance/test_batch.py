# SPDX-License-Identifier: Apache-2.0
"""`dynamo batch` on a real graph, killed in the middle and started again."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from dynamo_epd import batch
from tests.pixels import pixels, same_picture
from tests.serving import Graph, at_rest, eventually
from tests.test_batch import MANY, command, finished, lines_of, write_prompts


def test_a_run_killed_in_the_middle_and_resumed_equals_an_unbroken_one(seeing: Graph, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, *MANY)
    wanted = ("--images", "--url", seeing.url)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = command(prompts, "-o", broken, "--concurrency", "2", *wanted)
    results = broken / "results.jsonl"
    eventually(lambda: results.exists() and results.read_bytes().count(b"\n") >= 3, "three results", 120, 0.005)
    process.kill()
    finished(process)
    kept = results.read_text().split("\n")[:-1]
    assert 3 <= len(kept) < len(MANY), "it was killed in the middle"
    for line in kept:
        Image.open(broken / json.loads(line)["file"]).load()
    status, _, said = finished(command(prompts, "-o", broken, *wanted))
    assert status == batch.ALL_MATCH, said
    assert f"{len(MANY)} prompts, {len(kept)} done already" in said
    assert results.read_text().split("\n")[: len(kept)] == kept
    assert finished(command(prompts, "-o", whole, "--concurrency", "3", *wanted))[0] == batch.ALL_MATCH
    one = {line["key"]: line for line in lines_of(broken)}
    other = {line["key"]: line for line in lines_of(whole)}
    assert len(one) == len(lines_of(broken)) == len(MANY)
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    for key, record in one.items():
        assert {**record, "seconds": 0} == {**other[key], "seconds": 0}
        assert same_picture(*(pixels((place / record["file"]).read_bytes()) for place in (broken, whole)))
    at_rest(seeing, 5)
