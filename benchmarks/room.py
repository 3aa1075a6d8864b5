# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has room for what is started: memory and inotify instances, and cores that nobody else uses."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

REST_SECONDS, REST_LOOK_SECONDS = 180.0, 15.0
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
ARMS_GIB, ALONE_GIB = 16.0, 6.0
"""Memory that must be left to six arms at once, nine engines and two dozen stages; and to what a row starts alone. With
less one of them would be killed in the middle of a row."""
ARMS_INSTANCES, ALONE_INSTANCES = 80, 24
"""inotify instances that must be left, likewise: a watch of the file discovery takes two, and a stage watches each that
it asks."""


def lacking(*, arms: bool) -> str:
    """Why nothing can be measured here, in one line; empty where it can. ``arms``: with all that stand at once."""
    memory, left = ARMS_GIB if arms else ALONE_GIB, psutil.virtual_memory().available / 2**30
    if left < memory:
        return f"{left:.1f} GiB of memory are left, and {memory:g} are needed: end what holds them"
    instances, free = ARMS_INSTANCES if arms else ALONE_INSTANCES, free_inotify_instances()
    if free < instances:
        return (
            f"{free} of this user's inotify instances are left, and {instances} are needed: end other graphs, or raise "
            "the sysctl fs.inotify.max_user_instances"
        )
    return ""


def rest() -> None:
    """Waits until no more processes want to run than there are cores: what made models or installed this project is
    still in the average. Goes on after `REST_SECONDS`, and says so: whoever reads the report sees the load in it."""
    cores = os.cpu_count() or 1  # of the whole machine, as the load is
    end = time.monotonic() + REST_SECONDS
    while (load := os.getloadavg()[0]) >= cores:
        left = end - time.monotonic()
        if left <= 0:
            print(f"others use this machine (load average {load:.1f}): figures will be worse", file=sys.stderr)
            return
        print(f"waiting for a load average below {cores}: it is {load:.1f}", file=sys.stderr, flush=True)
        time.sleep(min(REST_LOOK_SECONDS, left))


def free_inotify_instances() -> int:
    """Of this user. A graph with two workers of each of its seven stages takes about a hundred of the usual 128."""
    taken = 0
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid():
                links = (os.readlink(entry.path) for entry in os.scandir(f"/proc/{process.pid}/fd"))
                taken += sum(link == "anon_inode:inotify" for link in links)
        except (psutil.Error, OSError):
            continue
    return int(INOTIFY.read_text()) - taken
