# SPDX-License-Identifier: Apache-2.0
"""What the plugin does to a process of vLLM. Progress delay and cores: test_graph_disagg.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DYING = """
import threading, time
from dynamo_epd.engine import plugin
threading.excepthook = plugin._die_with_the_listener
def fail(): raise OSError("address already in use")
threading.Thread(target=fail, name={name!r}, daemon=True).start()
time.sleep(5)
print("still here")
"""

GROUPS = """
import os, psutil, torch
from datetime import timedelta
from dynamo_epd.engine import plugin
from torch import distributed as dist
for _ in range(2):
    plugin._share_the_loop_of_gloo()
def one(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
    groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=60 + i)) for i in range(4)]
    for group in groups:
        value = torch.tensor([rank + 1.0])
        dist.all_reduce(value, group=group)
        assert value.item() == 3.0
    dist.monitored_barrier(groups[-1])
    assert [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups] == [60, 61, 62, 63]
    names = [open(f"/proc/self/task/{{t.id}}/comm").read().strip() for t in psutil.Process().threads()]
    os.write(1, f"loops {{names.count('gloo_tcp_loop')}}\\n".encode())  # at once: the other one writes there too
    dist.destroy_process_group()
if __name__ == "__main__":
    import multiprocessing
    processes = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(2)]
    for process in processes: process.start()
    for process in processes: process.join()
    assert [process.exitcode for process in processes] == [0, 0]
"""


def run(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", DYING.format(name=name)], capture_output=True, text=True, timeout=60)


def test_an_engine_whose_side_channel_dies_dies_with_it_and_says_why() -> None:
    from dynamo_epd.engine.plugin import LISTENER

    done = run(LISTENER)
    assert done.returncode == 1
    assert "address already in use" in done.stderr
    assert "still here" not in done.stdout


def test_all_groups_of_gloo_wait_in_one_thread_and_reduce_as_before(tmp_path: Path) -> None:
    program = GROUPS.format(store=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == ["loops 1", "loops 1", ""]


def test_steps_that_began_or_found_a_pull_are_followed_by_the_next_at_once() -> None:
    from queue import Queue

    from vllm.v1.engine.core import EngineCoreProc

    from dynamo_epd.engine.plugin import going_on

    class EngineDouble(EngineCoreProc):
        """Steps without a forward, of each of which its scheduler says whether it goes on, and then one with."""

        def __init__(self, goes_on: list[bool]):
            self.scheduler: Any = SimpleNamespace()
            self.output_queue: Any = Queue()
            self.goes_on = goes_on

        def __del__(self) -> None:
            """Nothing was started."""

    def step(core: EngineDouble) -> tuple[dict[int, str], bool]:
        if not core.goes_on:
            return {0: "tokens"}, True
        core.scheduler.goes_on = core.goes_on.pop(0)
        return {0: "stats"}, False

    stepping: Any = going_on(step)  # type: ignore[arg-type]
    engine = EngineDouble([False, True, True])
    assert stepping(engine) == ({0: "stats"}, False)
    assert engine.output_queue.empty(), "the loop puts what a step returns"
    assert stepping(engine) == ({0: "tokens"}, True), "begun, found, computed"
    assert [engine.output_queue.get_nowait() for _ in range(2)] == [(0, "stats"), (0, "stats")]
    assert engine.output_queue.empty()
    engine = EngineDouble([True] * 4)
    assert stepping(engine) == ({0: "stats"}, False), "and then vLLM's loop looks what else there is"
    assert engine.output_queue.qsize() == 2


def test_any_other_thread_may_die_alone() -> None:
    done = run("another")
    assert done.returncode == 0
    assert "still here" in done.stdout
