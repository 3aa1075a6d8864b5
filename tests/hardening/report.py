# SPDX-License-Identifier: Apache-2.0
"""What a long run says while it lasts, and what it leaves: ``build/hardening/NAME.log`` and ``NAME.json``.

pytest keeps what is printed until a test has failed; who waits for an hour looks into the log.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import psutil

from benchmarks.room import free_inotify_instances
from tests.toys.running import ROOT

DIRECTORY = ROOT / "build" / "hardening"


class Report:
    """``with Report(name, about=…) as report``: lines by `say`, facts by `note`, goals by `goal`.

    The JSON is written at the end of the block, however it ends.
    """

    def __init__(self, name: str, **about: Any):
        self.missed: list[str] = []
        """Goals that were not met, each with what was found."""
        DIRECTORY.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        self._stolen = psutil.cpu_times().steal
        self._path = DIRECTORY / f"{name}.json"
        self._log = (DIRECTORY / f"{name}.log").open("w", buffering=1)
        self._goals: list[dict[str, Any]] = []
        self._found: dict[str, Any] = {}
        self._about = {"run": name, "began": datetime.now(UTC).isoformat(timespec="seconds"), **about, **machine()}

    def say(self, text: str) -> None:
        """A line with the minutes since the run began."""
        line = f"{(time.monotonic() - self._began) / 60:6.1f} min  {text}"
        print(line, flush=True)
        print(line, file=self._log)

    def note(self, **found: Any) -> None:
        """Facts for the JSON."""
        self._found |= found

    def goal(self, what: str, met: bool, found: Any = None) -> bool:
        """Says and keeps whether a goal is met. Returns that."""
        plain = found is None or isinstance(found, bool | int | float | str)
        self._goals.append({"goal": what, "met": met, "found": found if plain else str(found)})
        shown = f"{what}: {'met' if met else 'NOT MET'}{'' if found is None else f' ({found})'}"
        self.say(shown)
        if not met:
            self.missed.append(shown)
        return met

    def __enter__(self) -> Report:
        self.say(", ".join(f"{name} {value}" for name, value in self._about.items()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        ended = {
            "seconds": round(seconds, 1),
            "stolen_cores": round((psutil.cpu_times().steal - self._stolen) / seconds, 3),
        }
        failed = {"error": f"{kind.__name__}: {error}"[:4000]} if kind else {}
        whole = {**self._about, **ended, "goals": self._goals, **self._found, **failed}
        self._path.write_text(json.dumps(whole, indent=1, default=str) + "\n")
        self.say(f"the report is {self._path.relative_to(ROOT)}")
        self._log.close()


def machine() -> dict[str, Any]:
    """What a figure is worth depends on: cores, memory, load, the commit, and how many inotify instances are left."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "free_memory_gib": round(psutil.virtual_memory().available / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "free_inotify_instances": free_inotify_instances(),
    }


class Clock:
    """``with Clock() as clock``: how late this process itself was.

    So a bound in seconds judges the graph, and not a machine that had no time for anybody.
    """

    EVERY = 0.02
    USUAL = 0.02
    """Lateness of a timer that says nothing."""

    def __init__(self) -> None:
        self._late = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="clock", daemon=True)

    def late(self) -> float:
        """Seconds that this process did not run when it should have, since the block began."""
        return self._late

    def _tick(self) -> None:
        while not self._stop.is_set():
            due = time.monotonic() + self.EVERY
            time.sleep(self.EVERY)
            late = time.monotonic() - due
            if late > self.USUAL:
                self._late += late

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
