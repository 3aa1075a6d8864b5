# SPDX-License-Identifier: Apache-2.0
"""Row 14: copies of T5 in a graph with several image workers: linked to an embed worker, and each with its own.

The pipeline is the tiny one with a T5 of 400 MB in the place of its own, random but seeded: both graphs make the same
pictures. Copies are counted where they are: in the checkpoint's own dtype weights stay pages of the file, so who holds
a T5 has its file mapped. What a worker holds is its resident set size once it has made pictures. The unique one, shown
beside it, would hide copies: workers of one machine that map a file share its pages. On cards, in other dtypes and on
several machines they do not.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import checkpoints
from benchmarks.arms import ROOT, START_SECONDS, WORK, Arm, graph
from benchmarks.figures import Goal, Row, Samples
from benchmarks.load import MODEL
from benchmarks.rows.pictures import LEVELS, difference

if TYPE_CHECKING:
    import numpy

NUMBER = 14
TITLE = "copies of T5 in a graph with several image workers"
TINY = ROOT / "models/tiny/image"
LARGE = {"d_ff": 16384, "num_layers": 16}
"""Instead of the tiny T5's: a hundred million parameters."""
MIB = 2**20
PICTURES_EACH = 2
WORKERS = 5
"""Of images, in each graph, however many repeats: each that has a T5 of its own holds 400 MB more."""
CONFIG = """
Common: {}
Frontend: {ui: false}
ImageWorker:
  common-configs: [model, served-model-name]
  dtype: float32
  sizes: {default: 64x64}
  ServiceArgs: {workers: WORKERS}
"""
EMBED = """
EmbedWorker: {common-configs: [model], dtype: float32}
"""


class PictureGraph(Arm):
    """A graph that makes pictures and answers no chat."""

    workers = 0

    @classmethod
    def of(cls, arm: Arm, workers: int) -> PictureGraph:
        """``workers``: so many make pictures."""
        one = cls(arm.name, arm._started, int(arm.url.rpartition(":")[2]))
        one.workers = workers
        return one

    def _until_it_answers(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if any(process.poll() is not None for process in self._processes):
                log = WORK / "logs" / f"{self.name}-0.log"
                raise RuntimeError(f"{self.name} has ended:\n{log.read_text(errors='replace')[-2000:]}")
            with suppress(OSError):
                with urllib.request.urlopen(f"{self.url}/health", timeout=10) as reply:
                    ready = json.load(reply)["stages"]["ImageWorker"]
                if ready == self.workers:  # one that was not there yet would hold little
                    self.picture(0)
                    return
            time.sleep(0.5)
        raise RuntimeError(f"{self.name} has made no picture within {START_SECONDS:g} s")

    def picture(self, seed: int) -> numpy.ndarray:
        """uint8 (height, width, 3). Raises OSError while there is nobody to make it."""
        import numpy
        from PIL import Image

        own = {"seed": seed, "num_inference_steps": 2}
        body = {"prompt": "a large red star on a blue background", "model": MODEL, "nvext": own}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/images/generations", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=120) as reply:
            data = base64.b64decode(json.load(reply)["data"][0]["b64_json"])
        return numpy.array(Image.open(io.BytesIO(data)).convert("RGB"))

    def memory(self, service: str) -> list[tuple[int, int]]:
        """(unique, resident) bytes of each worker of a service."""
        found = []
        for process in self.processes():
            words = process.cmdline()
            if "dynamo_epd.sdk.worker" in words and service in words:
                info = process.memory_full_info()
                found.append((info.uss, info.rss))
        return found

    def copies(self, files: Path) -> int:
        """Of what lies in the directory: all processes that have a file of it mapped."""
        return sum(
            any(Path(mapped.path).is_relative_to(files) for mapped in process.memory_maps())
            for process in self.processes()
        )


async def measure(repeats: int, pipeline: Path | None = None) -> Row:
    """The row. A pair of image workers, one of each graph, is a repeat: ``repeats`` of them, but `WORKERS` at most."""
    return _measure(min(repeats, WORKERS), pipeline or large())  # in no thread: nothing could end it


def _measure(workers: int, pipeline: Path) -> Row:
    encoder = (pipeline / "text_encoder").resolve()
    t5 = sum(file.stat().st_size for file in encoder.glob("*.safetensors"))
    row = Row(NUMBER, TITLE, f"a T5 of {t5 / MIB:.0f} MiB, graphs with {workers} image workers, one after the other")
    held, pictures, copies = {}, {}, {}
    for name, embed in (("conditioned", EMBED), ("unconditioned", "")):
        config = (WORK / f"{name}.yaml").absolute()
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(CONFIG.replace("WORKERS", str(workers)) + embed)
        with PictureGraph.of(graph(name, f"benchmarks.{name}:Frontend", str(config), pipeline), workers) as arm:
            row.notes += [f"`{command}`" for command in arm.commands]
            assert isinstance(arm, PictureGraph)
            pictures[name] = [arm.picture(seed) for seed in range(PICTURES_EACH * workers)]  # they take turns
            held[name] = sorted(arm.memory("ImageWorker"), key=lambda one: one[1])
            copies[name] = arm.copies(encoder)
            if embed:
                (alone,) = arm.memory("EmbedWorker")
                if alone[1] < t5:
                    row.void = "the embed worker holds no whole T5"
                row.samples.append(Samples("the embed worker (RSS)", [alone[1] / MIB], "MiB"))
    apart = zip(pictures["conditioned"], pictures["unconditioned"], strict=True)
    if max(difference(one, other) for one, other in apart) > LEVELS:
        row.void = "the two graphs make different pictures"
    if copies["unconditioned"] != workers or not copies["conditioned"]:
        row.void = f"{workers} workers with a T5 each have mapped {copies['unconditioned']}: not all copies are seen"
    for place, kind in enumerate(("USS", "RSS")):
        row.samples += [
            Samples(f"an image worker, {name} ({kind})", [one[place] / MIB for one in those], "MiB")
            for name, those in held.items()
        ]
    pairs = zip(held["unconditioned"], held["conditioned"], strict=True)
    saved = [(own[1] - linked[1]) / t5 for own, linked in pairs]
    row.goals += [
        Goal(f"copies in a graph of {workers}", [float(copies["conditioned"])], "≤", 1, "copies", worst=True),
        Goal("an image worker is smaller by, of the whole T5", saved, "≥", 1),
    ]
    row.notes.append(
        "RSS counts: served in the checkpoint's own dtype, weights stay pages of the file, which workers of one "
        "machine share; USS leaves them out. On cards, in other dtypes and on several machines each has its own."
    )
    return row


def large() -> Path:
    """The tiny pipeline with a large T5, written once."""
    return checkpoints.made(WORK / "image-large-t5", write)


def write(directory: Path) -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("text_encoder"))
    settings = json.loads((TINY / "text_encoder" / "config.json").read_text())
    torch.manual_seed(14)
    T5EncoderModel(T5Config(**settings | LARGE)).save_pretrained(directory / "text_encoder")
