# SPDX-License-Identifier: Apache-2.0
"""Arms that stand for several rows, those that are paused, and what their starts and their rest are worth."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import arms as arms_module
from benchmarks import checkpoints, standing
from benchmarks.arms import Arm
from benchmarks.checkpoints import TINY
from benchmarks.figures import Row
from benchmarks.load import Told
from benchmarks.rows import answer, start
from benchmarks.standing import Standing, Starts, turn
from tests.serving import eventually


class ArmDouble:
    """Notes what was done to it; starts nothing."""

    def __init__(self, name: str, log: list[str], seconds: float = 0.0, said: str = "yes", broken: bool = False):
        self.name, self._log, self.seconds_to_answer, self.first_said = name, log, seconds, said
        self.commands = [f"serve {name}"]
        self.url = "http://double"
        self.ended = False
        self._broken = broken

    def __enter__(self) -> ArmDouble:
        self.begin()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        self._log.append(f"start {self.name}")

    def wait(self) -> None:
        if self._broken:
            self.close()
            raise RuntimeError(f"{self.name}: a process ended:\nTraceback\nValueError: no such model")
        self._log.append(f"{self.name} answers")

    def close(self) -> None:
        self._log.append(f"end {self.name}")

    def resume(self) -> None:
        self._log.append(f"{self.name} goes on")

    def pause(self) -> None:
        self._log.append(f"{self.name} rests")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done to `ArmDouble`s, which stand for every arm."""
    done: list[str] = []
    doubles = {name: lambda _, name=name: ArmDouble(name, done, 40.0) for name in standing.START}
    monkeypatch.setattr(standing, "START", doubles)
    monkeypatch.setattr(start, "START", doubles)
    return done


def test_an_arm_starts_once_and_stands_while_rows_need_it(log: list[str]) -> None:
    arms, row = Standing(Path), Row(1, "t", "s")
    assert list(arms.arms(row, TINY, ("OURS-agg", "AGG"))) == ["OURS-agg", "AGG"]
    first = ["start AGG", "AGG answers", "AGG rests", "start OURS-agg", "OURS-agg answers", "OURS-agg rests"]
    assert log == first, "AGG begins: nothing else is at work then"
    assert list(arms.arms(row, TINY, ("AGG", "OURS-disagg"))) == ["AGG", "OURS-disagg"]
    assert log[6:8] == ["end OURS-agg", "start OURS-disagg"], "whom a row does not need it does not keep"
    assert row.notes == ["`serve OURS-agg`", "`serve AGG`", "`serve AGG`", "`serve OURS-disagg`"]
    del log[:]
    arms.arms(row, "larger", ("AGG",))
    assert set(log[:2]) == {"end AGG", "end OURS-disagg"} and log[2] == "start AGG", "another model, other arms"
    arms.close()
    assert log[-1] == "end AGG"
    arms.arms(row, "larger", ("AGG",))
    assert log[-1] == "AGG rests", "closed ones can be asked for again"


def test_an_arm_of_which_a_process_has_ended_is_started_anew(log: list[str]) -> None:
    arms, row = Standing(Path), Row(1, "t", "s")
    first = arms.arms(row, "tiny", ("AGG", "OURS-agg"))
    dead: Any = first["AGG"]
    dead.ended = True
    del log[:]
    second = arms.arms(row, "tiny", ("AGG", "OURS-agg"))
    assert log == ["end AGG", "start AGG", "AGG answers", "AGG rests"], "once, and the other one stands"
    assert second["AGG"] is not dead and second["OURS-agg"] is first["OURS-agg"]


def test_an_arm_has_ended_when_one_of_its_processes_has() -> None:
    arm = Arm("double", [], 1)
    for lines in ("import time; time.sleep(600)", "pass"):
        arm._processes.append(subprocess.Popen([sys.executable, "-c", lines], start_new_session=True))
    try:
        eventually(lambda: arm.ended, "a process that has ended", 20)
        arm._processes.pop()
        assert not arm.ended, "the other one goes on"
    finally:
        arm.close()


def test_arms_that_only_import_start_at_once_and_those_that_spin_come_last(log: list[str]) -> None:
    Standing(Path).arms(Row(1, "t", "s"), TINY, answer.ARMS)
    begun = [line.removeprefix("start ") for line in log if line.startswith("start ")]
    assert begun == ["AGG", "OURS-disagg", "AGG-tuned", "OURS-agg", "STOCK", "STOCK-tuned"]
    assert log[log.index("start AGG-tuned") + 1] == "start OURS-agg", "it does not wait for the other's answer"
    assert log.index("OURS-agg answers") < log.index("start STOCK") < log.index("start STOCK-tuned")
    assert log.index("start STOCK-tuned") < log.index("STOCK answers")


def test_starts_are_a_pair_only_where_nothing_else_was_at_work(log: list[str]) -> None:
    arms, row = Standing(Path), Row(1, "t", "s")
    arms.arms(row, TINY, ("AGG", "OURS-disagg", "STOCK"))
    assert arms.starts == [Starts({"AGG": 40.0, "OURS-disagg": 40.0}, {"AGG": "yes", "OURS-disagg": "yes"})]
    arms.arms(row, TINY, ("STOCK",))
    arms.arms(row, TINY, ("STOCK", "AGG", "OURS-disagg"))
    arms.close()
    del log[:]
    arms.arms(row, "larger", ("AGG", "OURS-disagg"))
    assert len(arms.starts) == 1, "no other model's"
    assert log[:2] == ["start AGG", "start OURS-disagg"], "which start at once"
    arms.close()
    arms.arms(row, TINY, ("AGG",))
    arms.arms(row, TINY, ("AGG", "OURS-disagg"))
    assert len(arms.starts) == 1
    arms.close()
    del log[:]
    arms.arms(row, TINY, ("OURS-disagg", "AGG"))
    assert len(arms.starts) == 2
    assert log.index("AGG rests") < log.index("start OURS-disagg"), "who spins stands still while the other starts"


def test_an_arm_that_does_not_start_leaves_the_others(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    doubles = dict(standing.START) | {"AGG-tuned": lambda _: ArmDouble("AGG-tuned", log, broken=True)}
    monkeypatch.setattr(standing, "START", doubles)
    arms = Standing(Path)
    with pytest.raises(RuntimeError, match="AGG-tuned: a process ended"):
        arms.arms(Row(1, "t", "s"), TINY, ("AGG", "AGG-tuned", "OURS-agg"))
    assert set(log[-2:]) == {"end AGG-tuned", "end OURS-agg"}, "what was begun beside it is ended, what stands is not"
    arms.close()
    assert log[-1] == "end AGG"


@pytest.mark.parametrize(("broken", "healthy"), [("STOCK-tuned", "STOCK"), ("STOCK", "STOCK-tuned")])
def test_one_of_stocks_that_does_not_start_is_left_out(
    broken: str, healthy: str, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    doubles = dict(standing.START) | {broken: lambda _: ArmDouble(broken, log, broken=True)}
    monkeypatch.setattr(standing, "START", doubles)
    row = Row(1, "t", "s")
    assert list(Standing(Path).arms(row, "tiny", ("AGG", "STOCK", "STOCK-tuned"))) == ["AGG", healthy]
    assert row.notes[0] == f"{broken}: not started: {broken}: a process ended: … ValueError: no such model"
    assert [line for line in log if line.startswith("end")] == [f"end {broken}"], "who began beside it goes on"


@pytest.mark.parametrize(("failures", "asked"), [(0, 1), (1, 2), (9, standing.AWAKE_TRIES)])
def test_a_turn_wakes_its_arm_up_and_asks_once_more(
    failures: int, asked: int, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    async def answered(*_: object) -> Told:
        log.append("asked")
        return Told("", 0.0, 0.0, failed="503: no") if log.count("asked") <= failures else Told("ab", 0.1, 0.2)

    async def go() -> None:
        async with turn(client, arm, row):
            log.append("its turn")

    monkeypatch.setattr(standing, "ask", answered)
    monkeypatch.setattr(standing, "AWAKE_PAUSE", 0.0)
    client: Any = None
    arm: Any = ArmDouble("STOCK", log)
    row = Row(1, "t", "s")
    asyncio.run(go())
    assert log == ["STOCK goes on", *["asked"] * asked, "its turn", "STOCK rests"] and len(row.client) == 1


def test_a_turn_of_an_open_loop_leaves_the_clients_share_to_its_windows(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    async def answered(*_: object) -> Told:
        return Told("ab", 0.1, 0.2)

    async def go() -> None:
        async with turn(client, arm, row):
            await asyncio.sleep(0.05)
            with standing.clients_share(row):
                while time.process_time() < busy:
                    pass

    monkeypatch.setattr(standing, "ask", answered)
    client: Any = None
    arm: Any = ArmDouble("AGG", log)
    row = Row(7, "t", "s", open_loop=True)
    busy = time.process_time() + 0.1
    asyncio.run(go())
    (share,) = row.client
    assert 0.0 < share <= 1.1


def test_an_arm_that_says_nothing_when_it_is_woken_up_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    async def silent(*_: object) -> Told:
        log.append("asked")
        await asyncio.sleep(600)
        raise AssertionError("it was waited for")

    async def go() -> None:
        async with turn(client, arm, Row(1, "t", "s")):
            log.append("its turn")

    monkeypatch.setattr(standing, "ask", silent)
    monkeypatch.setattr(standing, "AWAKE_SECONDS", 0.05)
    monkeypatch.setattr(standing, "AWAKE_PAUSE", 0.0)
    client: Any = None
    arm: Any = ArmDouble("STOCK", log)
    asyncio.run(go())
    assert log[1:] == ["asked", "asked", "its turn", "STOCK rests"]


def test_a_paused_arm_stands_and_keeps_its_registration(tmp_path: Path) -> None:
    registered = tmp_path / "instances" / "worker"
    registered.parent.mkdir()
    registered.touch()
    os.utime(registered, (1, 1))
    arm = Arm("double", [([sys.executable, "-c", "while True: pass"], {})], 1, spins=True, discovery=tmp_path)
    arm.begin()
    try:
        arm.pause()
        eventually(lambda: registered.stat().st_mtime > 1, "a touch", 20)
        os.utime(registered, (1, 1))
        eventually(lambda: registered.stat().st_mtime > 1, "another", 20)
        (process,) = arm.processes()
        eventually(lambda: process.status() == psutil.STATUS_STOPPED, "a stopped process", 20)
        arm.resume()
        eventually(lambda: process.status() != psutil.STATUS_STOPPED, "a process that goes on", 20)
    finally:
        arm.close()


def test_an_arm_tells_which_cores_its_threads_may_run_on() -> None:
    one = min(os.sched_getaffinity(0))
    bound = f"""
import os, threading, time
threading.Thread(target=lambda: (os.sched_setaffinity(0, [{one}]), time.sleep(600)), daemon=True).start()
time.sleep(600)
"""
    arm = Arm("double", [], 1)
    arm._processes.append(subprocess.Popen([sys.executable, "-c", bound], start_new_session=True))
    every = tuple(sorted(os.sched_getaffinity(0)))
    expected = {(one,): 2} if every == (one,) else {every: 1, (one,): 1}
    try:
        eventually(lambda: arm.masks() == expected, "a thread that has bound itself", 20)
    finally:
        arm.close()
    assert not arm.masks()


def test_agg_is_the_command_that_a_user_would_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arms_module, "WORK", tmp_path)
    for arm in (arms_module.agg(tmp_path, tuned=False), arms_module.agg(tmp_path, tuned=True)):
        ((command, environment),) = arm._started
        assert (Path(command[0]).name, *command[1:3]) == ("vllm", "serve", str(tmp_path))
        assert f"vllm serve {tmp_path} " in arm.commands[0]
        assert str(arms_module.ROOT) not in arm.commands[0], "a report tells of no machine's paths"
        assert os.access(command[0], os.X_OK)
        asked = [sys.executable, "-c", "import importlib.metadata as about; about.version('vllm')"]
        subprocess.run(asked, env=os.environ | environment, check=True, timeout=60)


def test_stocks_requests_go_the_way_that_they_go_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arms_module, "install_stock", lambda: None)
    monkeypatch.setenv("DYN_REQUEST_PLANE", "nats")
    for tuned in (False, True):
        started = arms_module.stock(tmp_path, tuned=tuned)._started
        assert [command[2] for command, _ in started] == ["dynamo.frontend", *["benchmarks.bounded_stock"] * 3]
        for _, environment in started:
            assert "DYN_REQUEST_PLANE" not in arms_module.environment_without_graphs() | environment


def test_stock_is_installed_anew_where_half_of_it_or_another_version_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, began = tmp_path / "stock", 0

    def pip(command: list[str], **_: Any) -> None:
        nonlocal began
        began += 1
        assert command[-2:] == [str(place), "ai-dynamo==1.6.1"] and not place.exists()
        (place / "dynamo" / "vllm").mkdir(parents=True)
        (place / "ai_dynamo-1.6.1.dist-info").mkdir()
        if began == 1:
            raise subprocess.CalledProcessError(1, command)
        (place / "ai_dynamo-1.6.1.dist-info" / "RECORD").touch()

    monkeypatch.setattr(arms_module, "STOCK", place)
    monkeypatch.setattr(subprocess, "run", pip)
    (place / "dynamo" / "vllm").mkdir(parents=True)
    (place / "ai_dynamo-1.6.0.dist-info").mkdir()
    with pytest.raises(subprocess.CalledProcessError):
        arms_module.install_stock()
    assert not place.exists(), "half of it is none"
    for _ in range(2):
        arms_module.install_stock()
    assert began == 2, "and once it is there it is left alone"


def test_tuned_arms_have_what_our_stages_set_for_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dynamo_epd.engine import environment

    found: dict[str, str] = {}
    monkeypatch.setattr(environment.os, "environ", found)
    monkeypatch.setattr(environment, "cpu_build", lambda: True)
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.NOTSET)
    with warnings.catch_warnings():
        environment.prepare({"model": str(tmp_path), "enforce_eager": True, "kv_cache_memory_bytes": 1})
    assert "VLLM_LOGGING_LEVEL" in found and "OMP_NUM_THREADS" in found
    assert found.items() <= (arms_module.CPU | arms_module.QUIET | arms_module.TUNED).items()


def test_what_rests_is_measured_with_all_of_its_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(answer, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(answer, "IDLE_REPEATS", 2)
    monkeypatch.setattr(arms_module, "WORK", tmp_path)
    busy, quiet = "while True: pass", "import time; time.sleep(600)"
    double = Arm("double", [([sys.executable, "-c", one], {}) for one in (busy, quiet)], 1)
    double.begin()
    try:
        shares = asyncio.run(answer.at_rest([double]))
    finally:
        double.close()
    assert len(shares["double"]) == 2 and 0.05 < min(shares["double"]) <= max(shares["double"]) < 1.5


def test_starts_are_taken_by_turns_and_who_begins_changes(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "directory", Path)
    row = asyncio.run(start.measure(Standing(Path), 5))
    begun = [line for line in log if line.startswith(("start", "end"))]
    ours, agg = ["start OURS-disagg", "end OURS-disagg"], ["start AGG", "end AGG"]
    assert begun == [*agg, *ours, *ours, *agg, *agg, *ours, *ours, *agg, *agg, *ours], "each alone"
    assert row.goals[0].values == pytest.approx([1.0] * 5) and row.met
    assert [(sample.arm, len(sample.values)) for sample in row.samples] == [("AGG", 5), ("OURS-disagg", 5)]


def test_starts_of_the_same_model_that_another_row_saw_are_judged_too(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "directory", Path)
    arms = Standing(Path)
    for model in (TINY, "larger"):
        arms.arms(Row(1, "t", "s"), model, tuple(standing.START))
    del log[:]
    row = asyncio.run(start.measure(arms, 5))
    begun = [line.removeprefix("start ") for line in log if line.startswith("start")]
    assert begun == ["OURS-disagg", "AGG", "AGG", "OURS-disagg"] * 2, "AGG began in the first pair"
    assert max(place for place, line in enumerate(log) if line == "end STOCK") < log.index("start AGG")
    assert len(row.goals[0].values) == len(row.samples[0].values) == 5
    assert "4 pairs, and 1 with which another row began" in row.setting


def test_three_pairs_start_alone_however_many_others_were_seen(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "directory", Path)
    arms = Standing(Path)
    pair = Starts({"AGG": 10.0, "OURS-disagg": 20.0}, {"AGG": "yes", "OURS-disagg": "yes"})
    arms.starts += [pair] * 9
    row = asyncio.run(start.measure(arms, 5))
    assert sorted(row.goals[0].values) == pytest.approx([1.0] * start.FEWEST + [2.0] * 2)


def test_first_answers_that_differ_make_the_starts_void() -> None:
    row = Row(12, "t", "s")
    alike, unlike = {"AGG": "a", "OURS-disagg": "a"}, {"AGG": "a", "OURS-disagg": "b"}
    seconds = {"AGG": 40.0, "OURS-disagg": 44.0}
    start.fill(row, [Starts(seconds, alike), Starts(seconds, unlike)])
    assert row.void == "1 of 2 first answers are not AGG's" and row.goals[0].values == pytest.approx([1.1] * 2)
