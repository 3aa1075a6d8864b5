# SPDX-License-Identifier: Apache-2.0
"""Row 11: eight pictures asked for at once, beside plain diffusers called for one after the other.

Through `Generator.generate`, the door that the image worker uses, called from a thread a picture; plain diffusers in a
process of its own. Text encoding and the VAE are in it on both sides.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.apart import Call, apart
from benchmarks.arms import ROOT, WORK
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import settled
from benchmarks.standing import rotated

if TYPE_CHECKING:
    import numpy

    from dynamo_epd.diffusion.generator import Generator, Made, Wanted

NUMBER = 11
TITLE = "pictures, eight at once"
AT_ONCE = 8
SIDE = 64
STEPS = 20
GUIDANCE = 1.5
TRAINED = ROOT / "models/tiny/image"
LEVELS = 2.0
"""Of 255: rows of a batch are summed in another order than a row alone."""
BOUND = 600.0


def tiny() -> Path:
    """A PixArt of two layers, 32 wide, with random weights, as `make test` draws with, and the trained T5. Written
    once."""
    from models import untrained

    directory = WORK / "pixart-tiny"
    untrained.write("pixart", directory)
    return directory


async def measure(repeats: int, models: Mapping[str, Path] | None = None, steps: int = STEPS) -> Row:
    """The row. ``repeats``: eight pictures our way and the same eight plainly, who begins by turns, then a late one.
    ``models``: by the name that the table has for them."""
    return _measure(repeats, models, steps)  # in no thread: nothing could end it


def _measure(repeats: int, models: Mapping[str, Path] | None, steps: int) -> Row:
    models = models if models is not None else {"tiny": tiny(), "trained": TRAINED}
    setting = f"{AT_ONCE} pictures of {SIDE} by {SIDE}, {steps} steps, guidance {GUIDANCE}, {repeats} repeats by turns"
    row = Row(NUMBER, TITLE, setting)
    *_, slowest = models
    for name, model in models.items():
        with apart(Plain, model) as plain:
            _one_model(row, name, model, plain, repeats, steps, late=name == slowest)
    row.notes.append(
        "What is won at once is judged where the cost of a call rules, with random weights. The trained model is 70 "
        "times as large, and on a CPU its arithmetic takes its time in batches too: the samples say what is won there. "
        f"How many steps a late one waits is judged with {slowest}: at tiny some pass while its thread begins."
    )
    return row


def _one_model(row: Row, name: str, model: Path, plain: Call, repeats: int, steps: int, *, late: bool) -> None:
    from components.image_worker import ImageConfig
    from dynamo_epd.diffusion.generator import Generator

    generator = Generator(str(model), dtype="float32", max_batch=ImageConfig(model=str(model)).max_batch)
    settled()

    def ours(wanted: Sequence[Wanted]) -> tuple[float, list[numpy.ndarray]]:
        began = time.perf_counter()
        made = at_once(generator, wanted)
        return time.perf_counter() - began, [one.pixels for one in made]

    ways: dict[str, Callable[[Sequence[Wanted]], tuple[float, list[numpy.ndarray]]]] = {
        "at once": ours,
        "plain diffusers, one after another": lambda wanted: plain("one_after_another", wanted),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    furthest: list[float] = []
    lates: list[Late] = []
    for repeat in range(1 + repeats):
        wanted = eight(steps, repeat)
        made: dict[str, list[numpy.ndarray]] = {}
        for way, make in rotated(ways, repeat):
            took, made[way] = make(wanted)
            if repeat:
                seconds[way].append(took)
        if not repeat:
            continue
        furthest.append(max(map(difference, *made.values())))
        if late:
            lates.append(Late(generator, replace(wanted[0], steps=4 * steps), wanted[1]))
    row.samples += [Samples(f"{name}, {way}", [1e3 * one for one in of], "ms") for way, of in seconds.items()]
    if late:
        waited = [1e3 * one.seconds_waited for one in lates]
        row.samples.append(Samples(f"{name}, a late one, until its first step is done", waited, "ms"))
    plainly, at_one = seconds["plain diffusers, one after another"], seconds["at once"]
    what, faster = f"{name}, one after another against at once", ratios(plainly, at_one)
    if row.goals:
        row.samples.append(Samples(what, faster, "times"))
    else:
        row.goals.append(Goal(what, faster, "≥", 2.5))
    if late:
        waits = [float(one.steps_waited) for one in lates]
        row.goals.append(Goal(f"{name}, a late one waits", waits, "≤", 1.0, "steps", worst=True))
    row.goals.append(
        Goal(f"{name}, a pixel's largest difference, same seed", furthest, "≤", LEVELS, "of 255", worst=True)
    )
    if max(furthest) > LEVELS:
        row.void = f"{name}: a pixel of a picture made at once is {max(furthest):g} of 255 from plain diffusers'"


def eight(steps: int, repeat: int) -> list[Wanted]:
    """Eight prompts with a seed each, new ones in each repeat."""
    from dynamo_epd.diffusion.generator import Wanted

    chance = random.Random(11 + repeat)
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "ring")
    numbers = range(repeat * AT_ONCE, (repeat + 1) * AT_ONCE)
    prompts = [f"a {chance.choice(colours)} {chance.choice(shapes)} on a white background, {one}" for one in numbers]
    return [Wanted(prompt, seed, SIDE, SIDE, steps, GUIDANCE) for prompt, seed in zip(prompts, numbers, strict=True)]


def at_once(generator: Generator, wanted: Sequence[Wanted]) -> list[Made]:
    """All asked for before the first is there."""
    with ThreadPoolExecutor(len(wanted)) as threads:
        making = [threads.submit(generator.generate, one, lambda *_: None, threading.Event()) for one in wanted]
        return [one.result(BOUND) for one in making]


class Late:
    """One picture is being made; another is asked for after its third step. Constructing it does it."""

    def __init__(self, generator: Generator, first: Wanted, second: Wanted):
        self._steps: list[float] = []
        """When the first picture's steps ended."""
        self._started = threading.Event()
        own: list[float] = []
        stop = threading.Event()

        def late_step(done: int, total: int, preview: Any) -> None:
            own.append(time.perf_counter())
            stop.set()  # of the first one: what is to be known is known

        with ThreadPoolExecutor(2) as threads:
            early = threads.submit(generator.generate, first, self._early_step, stop)
            if not self._started.wait(BOUND):
                raise TimeoutError("no step was made")
            arrived = time.perf_counter()
            threads.submit(generator.generate, second, late_step, threading.Event()).result(BOUND)
            early.exception(BOUND)  # it was stopped, or is through
        self.seconds_waited = own[0] - arrived
        step = sorted(later - sooner for sooner, later in zip(self._steps, self._steps[1:], strict=False))
        usual = step[len(step) // 2]
        self.steps_waited = sum(arrived < one < own[0] - usual / 2 for one in self._steps)
        """Steps of the first one that ended between the second's arrival and the beginning of its first step."""

    def _early_step(self, done: int, total: int, preview: Any) -> None:
        self._steps.append(time.perf_counter())
        if done == 3:
            self._started.set()


class Plain:
    """diffusers' own pipeline."""

    def __init__(self, model: Path):
        import diffusers

        self._pipeline = diffusers.DiffusionPipeline.from_pretrained(str(model))
        self._pipeline.set_progress_bar_config(disable=True)

    def one_after_another(self, wanted: Sequence[Wanted]) -> list[numpy.ndarray]:
        """uint8 (height, width, 3) each."""
        return [self.make(one) for one in wanted]

    def make(self, wanted: Wanted) -> numpy.ndarray:
        """uint8 (height, width, 3)."""
        import torch

        from dynamo_epd.diffusion.generator import to_bytes

        arguments: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
        with torch.inference_mode():
            made = self._pipeline(
                wanted.prompt,
                width=wanted.width,
                height=wanted.height,
                num_inference_steps=wanted.steps,
                guidance_scale=wanted.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(wanted.seed),
                output_type="np",
                **arguments,
            )
        return to_bytes(made.images[0])


def difference(one: numpy.ndarray, other: numpy.ndarray) -> float:
    """The furthest that a channel of a pixel is from the other picture's, of 255."""
    return float(abs(one.astype(int) - other.astype(int)).max())
