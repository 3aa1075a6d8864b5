# SPDX-License-Identifier: Apache-2.0
"""Names that lead where a test says, for one graph alone, and elsewhere whenever it says so."""

from __future__ import annotations

import itertools
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOSTS = Path("/etc/hosts")
WIDTH = 64
"""Characters of an address: a line is replaced by one as long, in one write, and nobody reads half of each."""
TURN_SECONDS = 0.0002
"""Less than passes between a check and its use."""


class Names:
    """The file at ``path``, which a graph whose command is `within` reads as ``/etc/hosts``: in a mount namespace of
    its own, so that the machine's stays as it is. The system's resolver reads it for every lookup.

    Where such a namespace is not to be had, `refusal` says why, and `within` changes nothing.
    """

    def __init__(self, path: Path):
        self._path = path
        self._machines = HOSTS.read_bytes().rstrip() + b"\n"
        path.write_bytes(self._machines)
        mounted = ("unshare", "--mount", "sh", "-c", f'mount --bind "$0" {HOSTS} && exec "$@"', str(path))
        tried = subprocess.run([*mounted, "true"], capture_output=True, text=True, timeout=60)
        self.refusal = tried.stderr.strip() or "refused" if tried.returncode else ""
        self.within = () if self.refusal else mounted

    def lead(self, name: str, *addresses: str) -> None:
        """``name`` leads to these, and any other name where the machine's own file says."""
        lines = "".join(f"{address:<{WIDTH}} {name}\n" for address in addresses).encode()
        with self._path.open("r+b") as file:
            os.pwrite(file.fileno(), lines, len(self._machines))
            file.truncate(len(self._machines) + len(lines))

    @contextmanager
    def turning(self, name: str, *addresses: str) -> Iterator[None]:
        """``name`` leads to one of them after the other, thousands of times a second, until the end of the block."""
        over = threading.Event()

        def turn() -> None:
            for address in itertools.cycle(addresses):
                self.lead(name, address)
                if over.wait(TURN_SECONDS):
                    return

        thread = threading.Thread(target=turn, name="names")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
