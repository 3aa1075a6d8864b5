# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has room for what is started: memory, inotify instances, and cores that nobody else is using."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

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
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # of the whole machine, both
    if load >= cores:
        return f"the load average is {load:.1f} on {cores} cores: wait until others have ended their work"
    return ""


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
