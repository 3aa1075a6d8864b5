# SPDX-License-Identifier: Apache-2.0
"""How many messages this process has dropped because they are none: not to be decoded, of no known shape.

Plain numbers by place, which `metrics` shows at each scrape. An engine's own process has no metrics of ours: it writes
its number where the worker that started it looks.
"""

from __future__ import annotations

import os
import struct
from collections import Counter

JOBS = "job queue"
SIDE_CHANNEL = "side channel"
SIDE_CHANNEL_FILE = "DYNAMO_SIDE_CHANNEL_DROPPED"
"""The path under which an engine finds the file for its number."""

_NUMBER = struct.Struct("<Q")
_counted: Counter[str] = Counter()
_files: dict[str, int] = {}


def watch(place: str) -> None:
    """Shows a place from now on, at 0: the first message there would be no increase else."""
    _counted[place] += 0


def count(place: str) -> None:
    """One message more."""
    _counted[place] += 1


def counts() -> dict[str, int]:
    """By place, of this process and of those that it shares files with."""
    return dict(_counted) | {
        place: _NUMBER.unpack(os.pread(file, _NUMBER.size, 0))[0] for place, file in list(_files.items())
    }


def share(place: str) -> str:
    """The path of a file in memory for the number of a child process, which is open as long as this process lives.

    Raises OSError where the system gives none.
    """
    if place not in _files:
        _files[place] = os.memfd_create(place.replace(" ", "-"))
        write(_files[place], 0)
    return f"/proc/{os.getpid()}/fd/{_files[place]}"


def write(file: int, number: int) -> None:
    """In a file of `share`."""
    os.pwrite(file, _NUMBER.pack(number), 0)
