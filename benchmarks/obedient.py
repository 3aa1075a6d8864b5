# SPDX-License-Identifier: Apache-2.0
"""A process of one's own that obeys lines of JSON: a command is a line of its input, an answer a line of its output."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_END = 2000
"""Characters of its log that are shown where it has ended."""
END_SECONDS = 10.0
FAILURES = (RuntimeError, OSError, subprocess.CalledProcessError)
"""With which a peer fails that could not be installed or started, or has ended: it costs its own figures, no others."""


def reason(error: BaseException) -> str:
    """What failed, and the last line of what it said: most often a log's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"


class Obedient:
    """The commanding end. Calls wait for the other process's answer."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        log: Path | None = None,
    ):
        """``environment`` and ``directory`` are this process' own where they are None; so is the place of what it
        writes to its standard error, which otherwise is the file ``log``."""
        self.name = name
        self._log = log
        with contextlib.ExitStack() as stack:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(log.open("wb")) if log else None,
                text=True,
                cwd=directory,
                env=environment,
            )

    def ask(self, what: str, **arguments: Any) -> Any:
        """`begin` and `answer`."""
        self.begin(what, **arguments)
        return self.answer()

    def begin(self, what: str, **arguments: Any) -> None:
        """Ask without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The next one. Raises RuntimeError where the process has ended, with the end of its log."""
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith("{"):  # UCX and engines write there too
            if not line:
                self._process.wait()
                shown = self._log.read_text(errors="replace")[-LOG_END:] if self._log else ""
                raise RuntimeError(f"{self.name} has ended:\n{shown}".rstrip(":\n"))
        return json.loads(line)

    def pause(self) -> None:
        """Stops it where it stands."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End of input: it ends by itself, or is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
