# SPDX-License-Identifier: Apache-2.0
"""Row 13: what an encode worker holds of a checkpoint, beside the bytes of its vision tower and projector.

Each repeat is a process of its own. It loads a tiny checkpoint of the same family first, so that imports, processor and
the library's own buffers are in its memory already; what it grows by afterwards is the weights. All begin at once, for
imports are most of it; the weights are loaded by one after the other, which then ends.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks import checkpoints
from benchmarks.arms import WORK, environment_without_graphs
from benchmarks.figures import Goal, Row, Samples
from benchmarks.obedient import Obedient

NUMBER = 13
TITLE = "weights of an encode worker"
SIZE = checkpoints.Size(layers=12, width=768, heads=12, side=224, patch=32, text_layers=12, text_width=1024)
"""A tower as CLIP B/32's beside a language model of twice its bytes."""
PARTS = ("vision_tower.", "multi_modal_projector.")
MIB = 2**20


def large() -> Path:
    """A checkpoint in `SIZE`, written once."""
    name = f"llava-weights-{checkpoints.hash_of(SIZE):08x}"
    return checkpoints.made(WORK / name, lambda path: checkpoints.write(SIZE, path))


async def measure(repeats: int, model: Path | None = None) -> Row:
    """The row. ``repeats``: processes."""
    model = model or large()
    small = checkpoints.directory("llava-tiny")
    needed, whole = part_bytes(model)
    setting = f"CLIP B/32's size, tower and projector {needed / MIB:.0f} of the checkpoint's {whole / MIB:.0f} MiB"
    row = Row(NUMBER, TITLE, f"{setting}, {repeats} processes")
    with ExitStack() as stack:
        loaders = [_loader(small, model, number) for number in range(repeats)]
        for loader in loaders:
            stack.callback(loader.kill)
        for loader in loaders:
            loader.answer()
        found = []
        for loader in loaders:
            found.append(loader.ask("load"))
            loader.kill()  # pages of the file that two have mapped would be nobody's own

    def of(name: str) -> list[float]:
        return [one[name] / MIB for one in found]

    row.samples += [
        Samples("grown by (USS)", of("uss"), "MiB"),
        Samples("grown by at its peak (RSS)", of("peak"), "MiB"),
        Samples("parameters that torch shows", of("parameters"), "MiB"),
        Samples("read from the disk", of("read"), "MiB"),
    ]
    row.goals.append(Goal("grown by, against tower and projector", [one["uss"] / needed for one in found], "≤", 1.1))
    row.notes.append(
        "What is read from the disk is read by pages and ahead, and 0 where the file system tells nothing."
    )
    return row


def part_bytes(model: Path) -> tuple[int, int]:
    """Bytes of the tower's and projector's tensors, and of all tensors of a checkpoint."""
    from safetensors import safe_open

    needed = whole = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                nbytes = tensors.get_tensor(name).nbytes
                whole += nbytes
                needed += nbytes if name.startswith(PARTS) else 0
    return needed, whole


def _loader(small: Path, model: Path, number: int) -> Obedient:
    """Says when it has loaded the small one, and what it grew by once it is told to load the other."""
    log = WORK / "logs" / f"encoder-weights-{number}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.rows.weights", str(small), str(model)]
    return Obedient("an encoder", command, environment=environment_without_graphs(), log=log)


def _load(small: str, model: str) -> dict[str, int]:
    """In the other process: bytes that it grows by."""
    from dynamo_epd.engine.environment import prepare

    prepare(_engine_args(small))
    from dynamo_epd.engine.encoder import Encoder

    first = Encoder(_engine_args(small))
    _embed(first, small)
    print(json.dumps({"there": True}), flush=True)
    sys.stdin.readline()
    for file in Path(model).glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    process = psutil.Process()
    before, read = process.memory_full_info(), process.io_counters().read_bytes
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    encoder = Encoder(_engine_args(model))
    _embed(encoder, model)
    after = process.memory_full_info()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    parameters: Any = encoder._model.parameters()
    return {
        "uss": after.uss - before.uss,
        "peak": 1024 * int(status["VmHWM"].split()[0]) - before.rss,
        "parameters": sum(one.nbytes for one in parameters if one.device.type != "meta"),
        "read": process.io_counters().read_bytes - read,
    }


def _embed(encoder: Any, model: str) -> None:
    """One picture: what a forward needs is then there."""
    from PIL import Image

    encoder.embed([encoder.process(Image.new("RGB", (224, 224), "grey"))])


def _engine_args(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 8},
    }


if __name__ == "__main__":
    print(json.dumps(_load(*sys.argv[1:])))
