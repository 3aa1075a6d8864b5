# SPDX-License-Identifier: Apache-2.0
"""Every command of the README, run as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.serving import Graph
from tests.toys.running import ROOT, Served

README = (ROOT / "README.md").read_text()
BLOCKS = [block.strip() for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)]
REPLIES = "".join(re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
CURLS = [block for block in BLOCKS if block.startswith("curl")]
BATCH = [block for block in BLOCKS if "dynamo batch" in block]
BUILD = [block for block in BLOCKS if "dynamo build" in block]
SCALE = [block for block in BLOCKS if "dynamo scale" in block]
ALONE = [block for block in BLOCKS if block not in CURLS + BATCH + BUILD + SCALE]
OTHERS = [line for block in ALONE for line in block.splitlines()]
MAKES = re.findall(r"^\$ (make \w+)", README, re.MULTILINE)
MENTIONED = sorted({*re.findall(r"`(make \w+)", README)} - {*MAKES})


def run(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_readme_has_the_commands_that_these_tests_run():
    assert MAKES == ["make serve", "make test"]
    assert len(CURLS) == 4
    assert len(BATCH) == len(BUILD) == len(SCALE) == 1
    assert len(OTHERS) == 11


@pytest.mark.parametrize("block", CURLS)
def test_what_is_asked_of_a_running_graph(block: str, seeing: Graph):
    for line in [block] if "-d '" in block else block.splitlines():
        done = run(line.replace("http://127.0.0.1:8000", seeing.url).replace("curl -s", "curl -sS --fail-with-body"))
        assert done.returncode == 0, done.stdout + done.stderr
        if "chat/completions" in line:
            answer = json.loads(done.stdout)
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == shown("content")
            assert choice["finish_reason"] == shown("finish_reason")
            written = json.loads(re.search(r'"usage": (\{[^}]*\})', README)[1])  # type: ignore[index]
            assert {key: answer["usage"][key] for key in written} == written, "the README shows this answer's usage"
        elif "validations" in line:
            (one,) = json.loads(done.stdout)["data"]
            for key in ("caption", "verdict", "size"):
                assert one[key] == shown(key)
            assert one["similarity"] == pytest.approx(float(shown("similarity")), abs=0.01)
        elif "images/jobs" in line:
            job = json.loads(done.stdout)
            assert job["object"] == "image.job"
            assert {"status": "queued", "n": 2}.items() <= job.items()
        elif "health" in line:
            assert json.loads(done.stdout)["status"] == "ready"
        else:
            assert "epd_request_duration_seconds_bucket" in done.stdout


def test_a_file_of_prompts(seeing: Graph, tmp_path: Path):
    done = run(BATCH[0].replace("build/validated", str(tmp_path)) + f" --url {seeing.url}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*.png"))) == len((ROOT / "docs/prompts.txt").read_text().splitlines())


def test_a_build_and_its_manifest(tmp_path: Path):
    done = run(f"set -e; export XDG_STATE_HOME={tmp_path}; {BUILD[0]}")
    assert done.returncode == 0, done.stdout + done.stderr
    directory, _, rendered = done.stdout.partition("\n")
    assert Path(directory).is_relative_to(tmp_path)
    made = yaml.safe_load(rendered)
    assert (made["kind"], made["metadata"]["name"]) == ("DynamoGraphDeployment", "demo")


def test_the_graph_that_is_scaled_and_watched_is_the_one_that_runs(seeing: Graph):
    """With as many workers as there are: one more would load an engine for a minute. `dynamo scale` does it below."""
    for line in SCALE[0].splitlines():
        done = run(f"XDG_STATE_HOME={seeing.state} {line.replace('EncodeWorker=2', 'EncodeWorker=1')}")
        assert done.returncode == 0, done.stdout + done.stderr
        expected = "EncodeWorker: 1 ready" if " scale " in line else "EncodeWorker +1/1"
        assert re.search(expected, done.stdout), done.stdout


def test_a_running_graph_is_scaled_and_watched(tmp_path: Path):
    """A small graph, whose workers start sooner, in the place of the one that the README names."""
    small = "tests/toys/scaled.py:Front"
    with Served(tmp_path, small) as served:
        served.wait_for(r"^http://", 300)
        for line in SCALE[0].splitlines():
            line = line.replace("graphs.cova:Frontend", small).replace("EncodeWorker", "Busy")
            done = run(f"XDG_STATE_HOME={tmp_path} {line}")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Busy: 2 ready" in done.stdout if " scale " in line else re.search(r"Busy +2/2", done.stdout)


def shown(key: str) -> str:
    """What the README's replies say under ``key``."""
    found = re.search(rf'"{key}": "?([^",]+)"?', REPLIES)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("line", OTHERS)
def test_what_needs_no_running_graph(line: str):
    done = run(line)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--dry-run" in line:
        resolved, _ = json.JSONDecoder().raw_decode(done.stdout)
        assert resolved["graph"] in line
    if "workers=3" in line:
        assert resolved["services"]["EncodeWorker"]["ServiceArgs"]["workers"] == 3


@pytest.mark.parametrize("command", [*MAKES, *MENTIONED])
def test_the_makefile_has_what_the_readme_names(command: str):
    done = run(command.replace("make", "make -n"))
    assert done.returncode == 0, done.stderr
