# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a process of vLLM. Progress delay and cores: test_graph_disagg.py."""

from __future__ import annotations

import subprocess
import sys

DYING = """
import threading, time
from dynamo_epd.engine import plugin
threading.excepthook = plugin._die_with_the_listener
def fail(): raise OSError("address already in use")
threading.Thread(target=fail, name={name!r}, daemon=True).start()
time.sleep(5)
print("still here")
"""


def run(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", DYING.format(name=name)], capture_output=True, text=True, timeout=60)


def test_an_engine_whose_side_channel_dies_dies_with_it_and_says_why() -> None:
    from dynamo_epd.engine.plugin import LISTENER

    done = run(LISTENER)
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "still here" not in done.stdout


def test_any_other_thread_may_die_alone() -> None:
    done = run("another")
    assert done.returncode == 0
    assert "still here" in done.stdout
