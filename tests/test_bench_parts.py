# SPDX-License-Identifier: Apache-2.0
"""The transfer under fire and some of the report's rows, at toy sizes and on real parts; what is said of a graph at
scale, which is run in acceptance/test_crowd.py."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import psutil
import pytest

from benchmarks import bare, checkpoints, fire, scale
from benchmarks.apart import Call, apart
from benchmarks.arms import ROOT
from benchmarks.load import picture
from benchmarks.obedient import Obedient
from benchmarks.rows import pictures, texts
from benchmarks.scale import Point
from dynamo_epd.batching import Batcher


def test_no_wrong_byte_comes_through_the_fire(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fire.main(["--hand-offs", "200", "--faults", "40", "--output", str(tmp_path)]) == 0
    assert "No wrong byte was handed on." in capsys.readouterr().out
    found = json.loads((tmp_path / "fire.json").read_text())
    good = [*found["alone_seconds"].values(), *found["together_seconds"].values()]
    assert sum(map(len, good)) == 160
    faults = found["faults"]
    assert set(faults) == set(fire.FAULTS)
    assert sum(sum(seen.values()) for seen in faults.values()) == 40
    for fault in ("flipped byte", "truncation", "stale slot"):
        assert set(faults[fault]) == {"DigestMismatch"}
    assert set(faults["expired lease"]) == {"LeaseExpired"}
    assert set(faults["dead peer"]) <= {"HandOffFailed", "StaleHandle"}
    assert set(faults["reuse"]) <= {"DigestMismatch", fire.RIGHT}


def test_a_wrong_byte_that_is_handed_on_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fire.main(["--hand-offs", "12", "--faults", "0", "--plant", "1", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.count("WRONG BYTES HANDED ON: ") == 1 and "No wrong byte" not in out
    assert json.loads((tmp_path / "fire.json").read_text())["passed"] is False


def test_a_fault_that_nobody_saw_and_a_good_one_refused_are_failures() -> None:
    tally = fire.Tally()
    tally.faults["reuse"][fire.RIGHT] += 1
    assert tally.passed, "the READ was over before the slot was reused"
    tally.faults["expired lease"][fire.RIGHT] += 1
    assert not tally.passed and tally.unnoticed == ["expired lease"]
    assert not fire.Tally(refused=["hand-off 3"]).passed


def test_a_seed_is_a_plan() -> None:
    plan = list(fire.plan(600, 120, 0, seed=3))
    assert plan == list(fire.plan(600, 120, 0, seed=3)) != list(fire.plan(600, 120, 0, seed=4))
    every = [one for group in plan for one in group]
    assert [one.number for one in every] == list(range(600))
    assert [sum(one.fault == fault for one in every) for fault in fire.FAULTS] == [20] * len(fire.FAULTS)
    assert {len(group) for group in plan} == {1, fire.COMPANY}


def test_more_faults_than_hand_offs_cannot_be_run() -> None:
    with pytest.raises(SystemExit) as ended:
        fire.main(["--hand-offs", "10", "--faults", "11"])
    assert ended.value.code == 2


def point(
    streams: int, kept: float, cores: dict[str, float], *, workers: int = 8, images: int = 0, others: float = 0.0
) -> Point:
    busiest = max(cores.items(), key=lambda one: one[1])
    return Point(workers, streams, images, 10, [], kept * 100, 100.0, [0.002], [0.003], cores, busiest, others)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([point(1, 0.99, {"Processor": 0.1})], "No wall up to 1 streams"),
        (
            [point(1, 0.99, {"Processor": 0.1}), point(64, 0.5, {"Processor": 0.97, "Frontend": 0.5})],
            "The first wall is Processor: at 64 streams",
        ),
        ([point(64, 0.5, {"Processor": 0.2})], "none of processor time"),
        ([point(64, 0.5, {"Processor": 0.97}, others=1000.0)], "Void: 64 streams"),
        # What few workers, or pictures, meet is not what streams meet.
        ([point(64, 0.5, {"a": 0.9}, workers=1), point(8, 0.9, {"a": 0.1})], "No wall up to 8 streams"),
        ([point(8, 0.2, {"a": 0.9}, images=4), point(16, 0.9, {"a": 0.1})], "No wall up to 16 streams"),
    ],
)
def test_the_wall_is_what_is_fully_used_first(points: Sequence[Point], said: str) -> None:
    assert said in scale.wall(points)


def test_the_wall_may_be_the_machine() -> None:
    cores = float(scale.machine()["cores"])
    shared = dict.fromkeys(("Frontend", "Processor", "CrowdWorker", "the clients"), cores / 4)
    if cores <= 2:
        assert "The first wall is the machine" in scale.wall([point(64, 0.5, shared)])
    crowd = dict.fromkeys(map(str, range(int(4 * cores))), 0.25)
    assert "The first wall is the machine" in scale.wall([point(64, 0.5, crowd)])


def test_workers_are_spread_evenly() -> None:
    import yaml

    for workers, processes, members in ((128, 4, 32), (3, 3, 1), (7, 1, 7)):
        found = yaml.safe_load(scale.config_of(workers))["CrowdWorker"]
        assert (found["ServiceArgs"]["workers"], found["members"]) == (processes, members)


DOUBLES = """
import asyncio, sys
from benchmarks import crowd, echoing

async def said(engine, sampling):
    return [delta.token_ids async for delta in engine.generate("a", list(range(40)), [], sampling=sampling)]

engines = echoing.EchoEngine(6, 0.0), crowd.PacedEngineDouble(crowd.CrowdConfig(prefill_seconds=0, token_seconds=0))
for engine in engines:
    for sampling, count in (("{}", 16), ('{"max_tokens": 3}', 3)):
        assert asyncio.run(said(engine, sampling)) == [[token] for token in range(count)], (engine, sampling)

from dynamo_epd.sdk import dynamo_context

dynamo_context.update(namespace="test", component="Test")
for worker in echoing.EchoWorker(), crowd.CrowdWorker():
    assert worker._taken_over.give("a", {}), "what a decode worker has, they have"
    assert worker.config.slots, "and a configuration of their own"
assert crowd.CrowdEncodeWorker().config.picture_seconds
"""
"""In a process of its own: their modules link services."""


def test_engines_and_workers_that_are_doubles_are_as_real_ones() -> None:
    subprocess.run([sys.executable, "-c", DOUBLES], cwd=ROOT, check=True, timeout=120)


ENCODE_STAGE = """
import asyncio, sys
import numpy, torch
from benchmarks import encoders
from dynamo_epd.engine import encoder

class EncoderDouble:
    def process(self, image):
        return torch.tensor(numpy.array(image.resize((4, 4))), dtype=torch.float32)

    def embed(self, items):
        return list(items) if sys.argv[1] == "right" else [*items[1:], items[0]]

    def patches(self, item):
        return 1

    def metadata(self, item):
        return {}

encoder.load_encoder = lambda engine_args: EncoderDouble()
asyncio.run(encoders.ours("none"))
"""
"""The encode worker and its arena are the real ones, its tower is a double: it may mix the pictures of a batch up."""


@pytest.mark.parametrize(("tower", "alike"), [("right", True), ("mixed up", False)])
def test_an_encode_stage_tells_how_far_a_batch_is_from_one_a_forward(tower: str, alike: bool, tmp_path: Path) -> None:
    urls = [picture(number) for number in range(6)]
    command = [sys.executable, "-c", ENCODE_STAGE, tower]
    stage = Obedient("an encode stage", command, directory=ROOT, log=tmp_path / "log")
    try:
        stage.answer()
        apart = stage.ask("compare", pictures=urls)["apart"]
        assert apart == 0.0 if alike else apart > 0.01
        assert stage.ask("encode", pictures=urls, most=None)["images"] == 6, "no other tenant's are there"
        assert stage.ask("encode", pictures=urls, most=1)["images"] == 0, "and these are"
    finally:
        stage.kill()


def test_who_is_apart_has_a_process_of_its_own_and_says_how_long_a_call_took() -> None:
    with apart(Path, ".") as path:
        seconds, found = path("resolve")
        assert found == Path.cwd() and 0 < seconds < 60
        with pytest.raises(IsADirectoryError):
            path("read_text")
    with apart(os.getpid) as pid:
        assert pid("__int__")[1] != os.getpid()


@contextmanager
def here(make: Any, *arguments: Any) -> Iterator[Call]:
    """A double of `apart` in this process, where a test can change what is called."""
    held = make(*arguments)

    def call(method: str, *given: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        found = getattr(held, method)(*given)
        return time.perf_counter() - began, found

    yield call


def test_texts_come_out_alike_every_way() -> None:
    row = asyncio.run(texts.measure(1, {"tiny": texts.TINY}))
    assert not row.void
    assert [goal.limit for goal in row.goals] == [6.0, 1.05]
    assert len(row.samples) == 5 and all(len(one.values) == 1 for one in row.samples)


def test_vectors_that_differ_make_the_row_void(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = texts.Direct.in_batches
    monkeypatch.setattr(texts.Direct, "in_batches", lambda self, of: forward(self, of)[::-1])
    monkeypatch.setattr(texts, "apart", here)
    row = asyncio.run(texts.measure(1, {"tiny": texts.TINY}))
    assert "fixed batches" in row.void and not row.met


def test_pictures_come_out_alike_at_once_and_alone() -> None:
    row = asyncio.run(pictures.measure(1, {"tiny": pictures.tiny(), "another": pictures.tiny()}, steps=4))
    goals: dict[str, Any] = {goal.what: goal for goal in row.goals}
    for name in ("tiny", "another"):
        assert goals.pop(f"{name}, a pixel's largest difference, same seed").met
    assert goals.pop("another, a late one waits").median >= 0
    assert list(goals) == ["tiny, one after another against at once"], "it is judged with the first model"
    assert [one.unit for one in row.samples] == ["ms"] * 5 + ["times"]


def test_who_begins_with_a_text_or_with_pictures_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    one, submit_all = texts.Direct.one, Batcher.submit_all

    def direct(self: texts.Direct, text: str) -> Any:
        log.append("direct")
        return one(self, text)

    async def submitted(self: Batcher[Any, Any], items: Sequence[Any]) -> Any:
        log.append("ours")
        return await submit_all(self, items)

    monkeypatch.setattr(texts.Direct, "one", direct)
    monkeypatch.setattr(texts.Direct, "one_by_one", lambda self, of: self.in_batches(of))
    monkeypatch.setattr(Batcher, "submit_all", submitted)
    monkeypatch.setattr(texts, "apart", here)
    asyncio.run(texts.measure(5, {"tiny": texts.TINY}))
    singles = log[-2 * 5 * texts.SINGLES :]
    pairs = list(zip(singles[::2], singles[1::2], strict=True))
    assert pairs.count(("ours", "direct")) == pairs.count(("direct", "ours")) == len(pairs) / 2
    log.clear()

    class PlainDouble:
        def __init__(self, model: Path):
            """Loads nothing."""

        def one_after_another(self, wanted: Sequence[Any]) -> Any:
            log.extend(["plain"] * len(wanted))
            return [numpy.zeros((2, 2, 3), numpy.uint8) for _ in wanted]

    def at_once(generator: Any, wanted: Sequence[Any]) -> list[Any]:
        log.extend(["ours"] * len(wanted))
        return [SimpleNamespace(pixels=numpy.zeros((2, 2, 3), numpy.uint8)) for _ in wanted]

    monkeypatch.setattr("dynamo_epd.diffusion.generator.Generator", lambda *_, **__: None)
    monkeypatch.setattr(pictures, "Plain", PlainDouble)
    monkeypatch.setattr(pictures, "Late", lambda *_: SimpleNamespace(steps_waited=0, seconds_waited=0.1))
    monkeypatch.setattr(pictures, "at_once", at_once)
    monkeypatch.setattr(pictures, "apart", here)
    row = asyncio.run(pictures.measure(5, {"tiny": Path()}))
    begins = log[:: 2 * pictures.AT_ONCE]
    assert len(begins) == 6 and begins.count("ours") == begins.count("plain") == 3
    assert not row.void and [len(one.values) for one in row.samples] == [5, 5, 5]


def test_pixels_that_differ_make_the_row_void(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "difference", lambda *_: 3.0)
    row = asyncio.run(pictures.measure(1, {"tiny": pictures.tiny()}, steps=4))
    assert row.void == "tiny: a pixel of a picture made at once is 3 of 255 from plain diffusers'" and not row.met


def test_a_model_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").touch()
        raise OSError("no space left")

    written: list[Path] = []

    def whole(directory: Path) -> None:
        written.append(directory)
        directory.mkdir()
        (directory / "config.json").touch()

    place = tmp_path / "models" / "one"
    with pytest.raises(OSError, match="no space left"):
        checkpoints.made(place, broken)
    assert not list(place.parent.iterdir())
    for _ in range(2):
        assert (checkpoints.made(place, whole) / "config.json").exists()
    assert len(written) == 1 and list(place.parent.iterdir()) == [place]


def test_a_text_goes_the_way_of_the_embed_workers_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    submit_all = Batcher.submit_all

    async def watched(self: Batcher[Any, Any], items: Sequence[Any]) -> Any:
        seen.append(len(items))
        return await submit_all(self, items)

    monkeypatch.setattr(Batcher, "submit_all", watched)
    asyncio.run(texts.measure(1, {"tiny": texts.TINY}))
    assert set(seen) == {texts.TEXTS, 1}, "all texts of a request at once"


def test_bare_calls_go_there_and_back_over_nats_and_leave_no_process() -> None:
    children = set(psutil.Process().children(recursive=True))
    seconds = bare.calls(3)
    assert len(seconds) == 3
    assert all(0.0 < one < 60.0 for one in seconds)
    assert set(psutil.Process().children(recursive=True)) <= children
