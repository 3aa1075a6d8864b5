# SPDX-License-Identifier: Apache-2.0
"""One run of the report: its order, what becomes of a row that fails, and what is written."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from benchmarks import __main__ as command
from benchmarks import fire, plan, preparing, recorded, report, room, scale, timeline
from benchmarks.arms import ROOT
from benchmarks.figures import Goal, Row, Samples
from benchmarks.goals import WORDS
from benchmarks.gpu import __main__ as gpu
from benchmarks.obedient import Obedient

READMES = (ROOT / "README.md").read_text() + (recorded.HERE / "README.md").read_text()


PREPARED: list[int] = []
"""Rows that `prepare`, here a double, was told of."""


@pytest.fixture(autouse=True)
def nothing_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models would be written, and Dynamo's stages installed."""
    PREPARED.clear()
    monkeypatch.setattr(command, "prepare", lambda steps: PREPARED.extend(step.number for step in steps))
    monkeypatch.setattr(command, "lacking", lambda *, arms: "")
    monkeypatch.setattr(command, "rest", lambda: None)


class StandingDouble:
    """Notes that it was closed."""

    def __init__(self, log: list[str]):
        self._log = log

    def close(self) -> None:
        self._log.append("close")


def measuring(log: list[str], number: int, error: Exception | None = None) -> Any:
    """A row in the place of a real one."""

    async def measure(repeats: int) -> Row:
        log.append(f"{number} by {repeats}")
        if error is not None:
            raise error
        return Row(number, f"title {number}", "setting", goals=[Goal("a goal", [1.0], "≤", 2.0)])

    return measure


def test_rows_that_share_arms_run_together_and_others_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    monkeypatch.setattr(command, "ROWS", {step.number: measuring(log, step.number) for step in plan.PLAN})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    rows = [str(number) for row in (12, 2, 9, 1) for number in ("--row", row)]
    assert command.main(["--output", str(tmp_path), "--repeats", "6", *rows]) == 0
    assert log == ["close", "2 by 6", "1 by 6", "12 by 6", "9 by 6", "close"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert [row["number"] for row in written["rows"]] == [1, 2, 9, 12], "in the report they are in order"
    assert [row["load"] for row in written["rows"]] == [[pytest.approx(0, abs=1e3)] * 2] * 4
    assert written["command"].endswith("--row 12 --row 2 --row 9 --row 1")
    told = capsys.readouterr()
    assert "| 12 | title 12: a goal | tiny | 1.00 times (1.00 … 1.00); goal ≤ 2.00 times | yes |" in told.out
    assert "| 9 | prefill to decode, time to first token of a text | 10 |" in told.err, "the plan comes first"
    assert "; 4 of 4 rows, 0 min gone, about 0 left" in told.err.splitlines()[-1]


def test_a_row_that_fails_is_said_and_the_next_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    error = RuntimeError("AGG: a process ended:\nTraceback\nValueError: no | such model\n")
    monkeypatch.setattr(command, "ROWS", {1: measuring(log, 1, error), 9: measuring(log, 9)})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    assert command.main(["--output", str(tmp_path), "--row", "1", "--row", "9"]) == 1
    assert log == ["1 by 10", "close", "9 by 10", "close"], "the arms of a row that failed are ended"
    failed, measured = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert failed["missing"] == "AGG: a process ended: … ValueError: no | such model"
    assert (failed["met"], measured["met"]) == (False, True)
    title = "| 1 | whole answer, one client | tiny |"
    told = capsys.readouterr()
    assert f"{title} AGG: a process ended: … ValueError: no / such model | **not measured** |" in told.out
    assert "row 1: 0 s of 270 planned, not measured: AGG" in told.err


def test_the_arms_of_a_void_row_are_ended_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def void(repeats: int) -> Row:
        return Row(1, "t", "s", void="a question to AGG failed")

    log: list[str] = []
    monkeypatch.setattr(command, "ROWS", {1: void, 9: measuring(log, 9)})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    assert command.main(["--output", str(tmp_path), "--row", "1", "--row", "9"]) == 1
    assert log == ["close", "9 by 10", "close"], "whatever failed there is not asked again"


def test_a_row_that_does_not_fit_is_left_out_and_a_shorter_one_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    planned = {step.number: step.seconds for step in plan.PLAN}
    left = planned[8] + 5.0
    gone = 60 * command.RUN_MINUTES - command.ENDING_SECONDS - left
    clock = [1_000.0]

    async def taking(repeats: int) -> Row:
        clock[0] += gone
        return await measuring(log, 1)(repeats)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(command, "ROWS", {1: taking} | {number: measuring(log, number) for number in (8, 12)})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    assert command.main(["--output", str(tmp_path), "--row", "1", "--row", "8", "--row", "12"]) == 1
    assert log == ["1 by 10", "8 by 5", "close"], "and the arms that stand are left alone for the next one"
    assert PREPARED == [1, 12, 8]
    one, eight, twelve = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (one["met"], eight["met"], twelve["met"]) == (True, True, False)
    assert twelve["missing"] == f"left out: it takes about {planned[12]} s, and {left:.0f} s of 30 minutes were left"
    assert f"| {twelve['model']} | {twelve['missing']} | **not measured** |" in capsys.readouterr().out


def test_a_row_has_no_longer_than_is_left_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waiting(repeats: int) -> Row:
        await asyncio.sleep(600)
        raise AssertionError("it never ends")

    assert command.measured(plan.PLAN[0], waiting, 5, 0.5).missing == "it was not done after 0.5 s"


def test_every_row_says_what_it_needs_and_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preparing.NEEDED.keys() == command.ROWS.keys()
    made: list[str] = []

    def broken() -> None:
        raise OSError("no space left")

    def whole() -> None:
        made.append("whole")

    monkeypatch.setattr(preparing, "NEEDED", {1: (broken, whole), 9: (whole,)})
    assert not preparing.make([1, 9]) and made == ["whole"], "what two rows need is made once"
    assert preparing.make([9]) and made == ["whole"] * 2


def test_what_is_prepared_is_made_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda given, **_: commands.append(given))
    preparing.prepare(plan.in_order([3, 9]))
    assert commands == [[sys.executable, "-m", "benchmarks.preparing", "3", "9"]]


@pytest.mark.parametrize(
    ("arms", "gib", "instances", "said"),
    [
        (True, 16.0, 80, ""),
        (True, 15.9, 80, "15.9 GiB of memory are left, and 16 are needed: "),
        (True, 16.0, 79, "79 of this user's inotify instances are left, and 80 are needed: "),
        (False, 6.0, 24, ""),
        (False, 5.9, 24, "5.9 GiB "),
        (False, 6.0, 23, "23 of this user's "),
    ],
)
def test_a_machine_without_room_is_said_in_one_line(
    arms: bool, gib: float, instances: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with arms that stand needs more than one that starts its own."""
    memory = SimpleNamespace(available=gib * 2**30)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(room, "free_inotify_instances", lambda: instances)
    found = room.lacking(arms=arms)
    assert "\n" not in found and (found.startswith(said) if said else not found)


@pytest.mark.parametrize(("loads", "looks"), [([1.9], 0), ([2.0, 2.0, 1.9], 2), ([2.5] * 9, 2)])
def test_a_run_waits_for_the_load_to_go_and_begins_without_it_at_last(
    loads: list[float], looks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    left = iter(loads)
    monkeypatch.setattr(room.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(room.os, "getloadavg", lambda: (next(left), 9.0, 9.0))
    monkeypatch.setattr(room.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(room.time, "sleep", slept.append)
    monkeypatch.setattr(room, "REST_SECONDS", 1.5 * room.REST_LOOK_SECONDS)
    room.rest()
    assert len(slept) == looks
    assert ("figures will be worse" in capsys.readouterr().err) == (loads[-1] >= 2)


def test_nothing_is_started_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    monkeypatch.setattr(command, "ROWS", {1: measuring(log, 1)})
    monkeypatch.setattr(command, "lacking", lambda *, arms: "5.0 GiB of memory are left" if arms else "")
    assert command.main(["--output", str(tmp_path / "report"), "--row", "1"]) == 2
    assert capsys.readouterr().err.endswith("benchmarks: 5.0 GiB of memory are left\n")
    assert not log and not PREPARED and not (tmp_path / "report").exists(), "what was measured before is still there"


def test_instances_that_a_process_of_this_user_takes_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import ctypes, time; ctypes.CDLL(None).inotify_init(); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            monkeypatch.setattr(psutil, "process_iter", lambda: [psutil.Process(process.pid)])
            assert room.free_inotify_instances() == int(room.INOTIFY.read_text()) - 1
        finally:
            process.kill()


def test_a_whole_report_names_the_goals_for_a_gpu_as_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    monkeypatch.setattr(command, "ROWS", {step.number: measuring(log, step.number) for step in plan.PLAN})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    assert command.main(["--output", str(tmp_path)]) == 0, "they are goals only where a GPU is at hand"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| GPU |")]
    whole = json.loads((tmp_path / "report.json").read_text())
    assert len(lines) == len(whole["gpu"]) == 3 and all(line.endswith("| **not measured** |") for line in lines)
    assert "nothing measures it yet; goal ≥ 1.8 times" in lines[0]
    assert "`python -m benchmarks.gpu` measures it; goal ≥ 2.3 times" in lines[1]
    assert command.main(["--output", str(tmp_path), "--row", "1"]) == 0
    assert "| GPU |" not in capsys.readouterr().out, "some rows are no report"


def test_what_was_measured_is_kept_when_the_run_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def interrupted(repeats: int) -> Row:
        raise SystemExit(143)

    log: list[str] = []
    monkeypatch.setattr(command, "ROWS", {1: measuring(log, 1), 9: interrupted})
    monkeypatch.setattr(command, "STANDING", StandingDouble(log))
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path), "--row", "1", "--row", "9"])
    assert log == ["1 by 10", "close"]
    assert [row["number"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]] == [1]
    assert "| 1 | title 1: a goal |" in (tmp_path / "report.md").read_text()


def test_a_row_that_waits_for_a_line_that_never_comes_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    async def waiting(repeats: int) -> Row:
        sleeper = Obedient("a sleeper", [sys.executable, "-c", "import time; time.sleep(600)"])
        try:
            sleeper.answer()
        finally:
            sleeper.kill()
        raise AssertionError("it never answers")

    monkeypatch.setattr(command, "ROW_SECONDS", 0.5)
    monkeypatch.setattr(command, "TIMES_LONGER", 0)
    assert command.measured(plan.PLAN[0], waiting, 5).missing == "it was not done after 0.5 s"


def test_a_row_is_ended_though_a_callback_has_swallowed_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    swallowed: list[object] = []

    async def stuck(repeats: int) -> Row:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, about: swallowed.append(about["exception"]))
        loop.call_soon(time.sleep, 2.0)
        await asyncio.sleep(600)
        raise AssertionError("it was never ended")

    monkeypatch.setattr(command, "ROW_SECONDS", 0.5)
    monkeypatch.setattr(command, "TIMES_LONGER", 0)
    monkeypatch.setattr(command, "AGAIN_SECONDS", 1.0)
    assert command.measured(plan.PLAN[0], stuck, 5).missing == "it was not done after 0.5 s"
    assert len(swallowed) == 1 and isinstance(swallowed[0], command.Late)


def test_every_row_has_its_place_in_the_plan() -> None:
    rows = {path.stem for path in Path(plan.__file__).with_name("rows").glob("*.py")}
    assert sorted(step.row.__name__.rpartition(".")[2] for step in plan.PLAN) == sorted(rows)
    assert len(command.ROWS) == len(rows) and command.ROWS.keys() == WORDS.keys()
    before, *_ = (recorded.HERE / "README.md").read_text().partition(recorded.begin("report"))
    explained = re.findall(r"^\| (\d+) \| .* \| ([^|]*) \|$", before, re.MULTILINE)
    assert {int(number): model for number, model in explained} == plan.MODELS, "as the README's table says"
    assert min(step.repeats for step in plan.PLAN) >= 5
    stands = [step.stands for step in plan.PLAN]
    assert stands == sorted(stands), "arms that stand would disturb rows that need none"
    assert sum(step.seconds for step in plan.PLAN) <= 1_740
    assert [step.number for step in plan.in_order([9, 3])] == [3, 9] and plan.in_order([]) == [*plan.PLAN]


def test_the_plan_is_shown_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--plan", "--row", "3"]) == 0
    (*_, row, total) = capsys.readouterr().out.splitlines()
    assert row.startswith("| 3 | embedding hand-off, digest checked | 12 | four processes that own memory")
    assert (row[-6:], total) == ("| 65 |", "| | | | | 65 |")


@pytest.mark.parametrize(
    "given",
    [["--repeats", "4"], ["--row", "15"], ["--record", "--row", "1"], ["--minutes", "0.5"], ["--minutes", "nan"]],
)
def test_what_is_no_report_is_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.options_of(given)
    assert ended.value.code == 2


def test_a_report_says_under_which_conditions_it_was_made(tmp_path: Path) -> None:
    row = Row(1, "t", "s", goals=[Goal("shown", [2.0])], client=[0.02, 0.08, 0.09], load=[0.5, 2.0], seconds=61.0)
    assert not row.met, "what is shown is no goal"
    text = report.write([row], "a command", tmp_path)
    assert "| 1 | t: shown |  | 2.00 times (2.00 … 2.00) | no goal |" in text
    said = "61 s; load average 0.50 before, 2.00 at the end; the client took 8.0% of a core, 9.0% at most"
    assert f"{said}." in text, "in a closed loop client and server take turns"
    row.open_loop = True
    said = said.replace("of a core, ", "of a core while requests came at a rate, ")
    assert f"{said}, **more" in report.write([row], "a command", tmp_path)
    about = json.loads((tmp_path / "report.json").read_text())["machine"]
    assert len(about["load"]) == 3 and "commit" in about


def test_a_plot_that_cannot_be_drawn_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(row: Row, path: Path) -> None:
        raise ValueError("there are no fonts")

    monkeypatch.setattr(report, "_plot", broken)
    text = report.write([Row(1, "t", "s", [Samples("a", [1.0], "ms")])], "a command", tmp_path)
    assert "| a | 1.00 (1.00 … 1.00) ms |" in text and "row-1.png" not in text


def test_samples_without_values_cost_no_report(tmp_path: Path) -> None:
    row = Row(1, "t", "s", [Samples("lost", [], "ms"), Samples("a", [2.0], "s")])
    text = report.write([row, Row(2, "t", "s", [Samples("lost", [], "ms")])], "a command", tmp_path)
    assert text.count("| lost | none |") == 2 and "| a | 2.00 (2.00 … 2.00) s |" in text
    assert "row-1.png" in text and "row-2.png" not in text, "what has values is drawn"


def test_a_report_says_how_long_the_whole_run_took(tmp_path: Path) -> None:
    row = Row(1, "t", "s", seconds=60.0)
    text = report.write([row], "a command", tmp_path, began=time.monotonic() - 240)
    assert "before; 4 minutes; " in text, "plots and what is between rows too"


def test_a_report_is_recorded_as_it_is(tmp_path: Path) -> None:
    made, kept = tmp_path / "made", tmp_path / "kept"
    kept.mkdir()
    begin, end = recorded.begin("report"), recorded.END
    (kept / "README.md").write_text(f"before\n{begin}\nan older one\n{end}\nafter\n")
    (kept / "report").mkdir()
    for name in ("row-1.png", "row-3.png", "fire.json"):
        (kept / "report" / name).write_text("of an older one")
    row = Row(1, "t", "s", [Samples("a", [1.0, 2.0], "ms")], [Goal("g", [1.0], "≤", 1.0)])
    text = report.write([row], "a command", made)
    (made / "row-2.png").write_text("of another run")
    for _ in range(2):
        report.record(made, kept)
    shown = text.replace("(row-1.png)", "(report/row-1.png)")
    assert (kept / "README.md").read_text() == f"before\n{begin}\n{shown}{end}\nafter\n"
    assert sorted(file.name for file in (kept / "report").iterdir()) == ["fire.json", "report.json", "row-1.png"]
    assert (kept / "report" / "row-1.png").read_bytes() == (made / "row-1.png").read_bytes()


def test_every_goal_that_the_recorded_report_misses_has_its_paragraph_and_no_other() -> None:
    assert recorded.unexplained() == []


def test_a_goal_that_is_missed_wants_a_paragraph_that_no_record_takes_away(tmp_path: Path) -> None:
    rows = [
        Row(8, "t", "s", goals=[Goal("with a barrier", [1.0], "≤", 0.7), Goal("shown", [9.0])]),
        Row(9, "t", "s", goals=[Goal("against AGG", [1.0], "≤", 1.15), Goal("lost", [], "≤", 1.0)]),
        Row(10, "t", "s", goals=[Goal("faster", [1.0], "≥", 6.0)], void="vectors differ"),
        Row(12, "t", "s", missing="left out"),
    ]
    readme = tmp_path / "README.md"
    head = f"{recorded.begin('report')}\nnone\n{recorded.END}\n\n{recorded.MISSED}\n\n**The number** comes first.\n\n"
    readme.write_text(
        f"{head}**7. raw** is of an older run.\n\n**8. with a barrier** is a barrier.\n\n## At scale\n\n**9. lost**\n"
    )
    assert recorded.unexplained(tmp_path) == [
        f"**{key}**: it has a paragraph, and is not missed" for key in ("7. raw", "8. with a barrier")
    ], "nothing is recorded yet"
    report.write(rows, "a command", tmp_path / "made")
    report.record(tmp_path / "made", tmp_path)
    assert recorded.unexplained(tmp_path) == [
        "**9. lost**: it is missed, and has no paragraph",
        "**7. raw**: it has a paragraph, and is not missed",
    ], "what stands in another section is none"
    readme.write_text(readme.read_text().replace("**7. raw** is of an older run.", "**9. lost** was not measured."))
    report.record(tmp_path / "made", tmp_path)
    assert recorded.unexplained(tmp_path) == []


def test_a_block_is_replaced_alone_and_has_to_be_there(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    blocks = [f"{recorded.begin(name)}\nan older {name}\n{recorded.END}\n" for name in ("fire", "scale")]
    readme.write_text("before\n" + "between\n".join(blocks) + "after\n")
    recorded.put("scale", "a new one\n", readme)
    newer = blocks[1].replace("an older scale", "a new one")
    assert readme.read_text() == f"before\n{blocks[0]}between\n{newer}after\n"
    with pytest.raises(ValueError, match="has no block"):
        recorded.put("planner", "a new one\n", readme)


def test_the_readme_has_each_block_once() -> None:
    marks = re.findall(r"^<!-- (.*) -->$", (recorded.HERE / "README.md").read_text(), re.MULTILINE)
    names = ("report", "fire", "scale", "timeline")
    assert marks == [mark for name in names for mark in (f"the last {name}", "its end")]


@pytest.mark.parametrize("made", sorted(set(re.findall(r"`(make bench[^`]*)`", READMES))))
def test_make_bench_is_the_run_that_the_readmes_mean(made: str) -> None:
    done = subprocess.run(
        ["bash", "-c", made.replace("make", "make -n", 1)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (arguments,) = re.findall(r"-m benchmarks\b(.*)$", done.stdout, re.MULTILINE)
    options = command.options_of(shlex.split(arguments))
    rows = re.search(r'ROW="?([\d ]+)', made)
    assert options.row == ([int(row) for row in rows[1].split()] if rows else [])
    for name in ("plan", "tuned", "record"):
        assert getattr(options, name) is (f"--{name}" in made)


@pytest.mark.parametrize(
    ("made", "name", "main"),
    [
        ("make fire", "benchmarks.fire", fire.main),
        ("make scale", "benchmarks.scale", scale.main),
        ("make timeline", "benchmarks.timeline", timeline.main),
        (".venv/bin/python -m benchmarks.gpu", "benchmarks.gpu", gpu.main),
    ],
)
def test_benchmarks_of_their_own_are_commands(
    made: str, name: str, main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert READMES.count(f"| `{made}` |") == 2, "both READMEs name it"
    if made.startswith("make"):
        done = subprocess.run(
            [*made.replace("make", "make -n", 1).split(), "ARGS=--record"], cwd=ROOT, capture_output=True, text=True
        )
        assert f"python -m {name} --record\n" in done.stdout
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert f"python -m {name} " in capsys.readouterr().out


def test_a_run_under_fire_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-offs themselves: test_bench_parts.py."""

    async def run(self: fire.Fire, groups: Any) -> fire.Tally:
        return fire.Tally(alone={"4 KiB": [0.001, 0.002, 0.003]})

    kept: list[tuple[str, str, list[Path]]] = []
    monkeypatch.setattr(fire, "Fire", type("FireDouble", (), {"__init__": lambda *_: None, "run": run}))
    monkeypatch.setattr(fire, "keep", lambda *given: kept.append(given))
    given = ["--hand-offs", "3", "--faults", "0", "--output", str(tmp_path)]
    assert fire.main(given) == 0 and not kept
    assert fire.main([*given, "--record"]) == 0
    ((name, text, files),) = kept
    assert (name, files) == ("fire", [tmp_path / "fire.json"])
    assert re.match(
        r"`python -m benchmarks\.fire --hand-offs 3 .*` at .* cores, .*; 3 hand-offs, seed 7, \d+ s; ", text
    )
    assert "| 4 KiB, alone | 3 | 2.00 | 3.00 | 3.00 | 3.00 |" in text and text.endswith("handed on.\n")
    for size in fire.SIZES:
        assert f"| {size}, digest alone | {fire.DIGEST_REPEATS} | " in text
    with pytest.raises(SystemExit):
        fire.main([*given, "--record", "--plant", "1"])


def test_a_run_at_scale_is_recorded_with_its_plot_and_its_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the graph itself: acceptance/test_crowd.py."""

    async def measured(*_: Any) -> list[scale.Point]:
        cores = {"Processor": 0.1}
        return [
            scale.Point(8, streams, 0, 10, [], 99.0, 100.0, [0.002], [0.003], cores, ("Processor", 0.1), 0.0)
            for streams in (8, 1)
        ]

    (tmp_path / "README.md").write_text(f"{recorded.begin('scale')}\nnone\n{recorded.END}\n")
    monkeypatch.setattr(scale, "measure", measured)
    monkeypatch.setattr(scale, "keep", partial(recorded.keep, directory=tmp_path))
    assert scale.main(["--output", str(tmp_path / "made"), "--record"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "\nNo wall up to 8 streams: 99% of what the doubles would allow.\n" in text
    assert "](report/scale.png)\n" in text and "`python -m benchmarks.scale " in text
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"scale.json", "scale.png"}
