# SPDX-License-Identifier: Apache-2.0
"""``dynamo top``: the stages of a running graph in a terminal, looked at again and again."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from typing import Any

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.control import ControlError, find
from dynamo_epd.sdk.watching import Stage, Watch

SHORTEST, LONGEST = 0.2, 60.0
PLAIN_WIDTH = 160
"""Columns where there is no terminal to ask."""
NONE = "-"
NO_METRICS = "These workers have no metrics: the graph was served with DYN_SYSTEM_PORT=-1."


@dataclasses.dataclass(frozen=True)
class Graph:
    """``began``: Unix seconds."""

    name: str
    pid: int
    began: float
    socket: str


def top(arguments: argparse.Namespace) -> int:
    """Shows the graph until Ctrl-C, or once where that is asked for or nobody watches.

    Exit status 0; 1 when the graph goes; 130 for Ctrl-C before there was anything to show. Raises ConfigError for a
    graph that does not run, and for an interval that is too short or too long.
    """
    if not SHORTEST <= arguments.interval <= LONGEST:
        raise ConfigError(f"--interval must be from {SHORTEST:g} to {LONGEST:g} seconds")
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    watched = sys.stdout.isatty() and not console.is_dumb_terminal
    live = watched and not (arguments.once or arguments.json)
    try:
        record = find(arguments.graph, [], arguments.pid)
        graph = Graph(record["graph"], record["pid"], psutil.Process(record["pid"]).create_time(), record["socket"])
        asyncio.run(_watch(graph, arguments.interval, console, live=live, as_json=arguments.json))
    except (ControlError, psutil.NoSuchProcess) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if live else 130
    return 0


async def _watch(graph: Graph, interval: float, console: Console, *, live: bool, as_json: bool) -> None:
    watch, screen = Watch(graph.socket), Screen(graph)
    try:
        stages = await watch.look()
        if live:
            with Live(console=console, screen=True, auto_refresh=False) as shown:
                while True:
                    shown.update(screen.show(stages, watch), refresh=True)
                    await asyncio.sleep(interval)
                    stages = await watch.look()
        await asyncio.sleep(interval)
        stages = await watch.look()
        if as_json:
            print(json.dumps(_as_json(graph, stages, watch, interval)))
        else:
            console.print(screen.show(stages, watch))
    finally:
        await watch.close()


def _as_json(graph: Graph, stages: list[Stage], watch: Watch, interval: float) -> dict[str, Any]:
    return {
        "graph": graph.name,
        "pid": graph.pid,
        "uptime_seconds": round(time.time() - graph.began, 3),
        "url": watch.url,
        "interval": interval,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }


class Screen:
    """The head line and the table. A column is there from the moment that any stage has something for it."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._used = {"stage", "ready"}

    def show(self, stages: list[Stage], watch: Watch) -> Group:
        rows = [cells(stage) for stage in stages]
        self._used |= {column for row in rows for column, text in row.items() if text != NONE}
        table = Table(box=None, header_style="bold", pad_edge=False)
        columns = [column for column in rows[0] if column in self._used] if rows else []
        for column in columns:
            table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
        for stage, row in zip(stages, rows, strict=True):
            short = stage.ready < stage.wanted or stage.silent
            table.add_row(*(row[column] for column in columns), style="bold red" if short else None)
        up = duration(time.time() - self._graph.began)
        head = Text(" · ".join([self._graph.name, f"up {up}", *([watch.url] if watch.url else [])]), style="bold")
        return Group(head, "", table, *([] if watch.reports else ["", NO_METRICS]))


def cells(stage: Stage) -> dict[str, str]:
    """Column → text, in order."""
    wait = NONE if stage.wait_p50 is None else f"{seconds(stage.wait_p50)} {seconds(stage.wait_p99)}"
    return {
        "stage": stage.name,
        "ready": f"{stage.ready}/{stage.wanted}" + (f", {stage.silent} silent" if stage.silent else ""),
        "queue": number(stage.queue_depth),
        "jobs": number(stage.job_queue_depth),
        "wait p50 p99": wait,
        "run": seconds(stage.run_seconds),
        "req/s": number(stage.requests_per_second),
        "output/s": NONE if stage.output_per_second is None else f"{number(stage.output_per_second)} {stage.output}",
        "cache": NONE if stage.cache_hit_rate is None else f"{stage.cache_hit_rate:.0%}",
        "NIXL/s": size(stage.nixl_bytes_per_second),
        "failed": NONE if stage.failures is None else str(stage.failures),
        "memory": size(stage.memory_bytes),
    }


def number(value: float | None) -> str:
    """Three figures, and no more than a rate has."""
    if value is None:
        return NONE
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.1f} s"


def size(value: float | None) -> str:
    """Bytes with binary prefixes."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def duration(value: float) -> str:
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
