# SPDX-License-Identifier: Apache-2.0
"""Row 10: many short texts at once through the embed worker's batching, beside transformers called in two usual ways.

All of it without a message: tokenizing, the forward and the pooled vector. *One by one* is a call of the model for each
text; *fixed batches* are sorted by length and padded to their longest, 32 at a time, as sentence-transformers does by
default; both are in a process of their own. The embed worker's own way is that of its endpoint, with its own defaults:
tokenized in a thread, then all texts of a request handed to its `Batcher`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy

from benchmarks import checkpoints
from benchmarks.apart import Call, apart
from benchmarks.arms import ROOT, WORK
from benchmarks.figures import Goal, Row, Samples, ratios
from benchmarks.load import settled
from benchmarks.standing import rotated

NUMBER = 10
TITLE = "T5, many short texts at once"
TEXTS = 64
FIXED = 32
WARM_UP = 1
ROUNDS = 5
"""Of all texts, one after another in a turn, unless they take too long. The median is taken: who begins anew finds
cores and caches cold, one by one at the first of 64 forwards, and a batch in all of its one."""
ROUNDS_SECONDS = 1.0
SINGLES = 20
"""Single texts of which one repeat's median is taken."""
TINY = ROOT / "models/tiny/t5"
BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
"""T5 base's encoder: 110 million parameters."""
CLOSE = 1e-4
"""Largest difference of a number of two vectors of length 1 that are still the same."""

WORDS = ("a", "small", "large", "red", "green", "blue", "circle", "square", "star", "on", "the", "background", "of")


def short_texts(count: int, seed: int = 10) -> list[str]:
    """4 to 16 words each."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(4, 16))) for _ in range(count)]


def base() -> Path:
    """T5 base's encoder with random weights and the tiny model's tokenizer, written once."""
    return checkpoints.made(WORK / "t5-base", write)


def write(directory: Path) -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, directory)
    torch.manual_seed(10)
    T5EncoderModel(T5Config(**BASE)).save_pretrained(directory)


async def measure(repeats: int, models: dict[str, Path] | None = None) -> Row:
    """The row. ``models``: by the name that the table has for them."""
    models = models if models is not None else {"tiny": TINY, "T5 base": base()}
    setting = f"{TEXTS} texts of 4 to 16 words, no messages, random weights but for tiny, {repeats} repeats by turns"
    row = Row(NUMBER, TITLE, setting)
    for name, model in models.items():
        with apart(Direct, model) as direct:
            await _one_model(row, name, model, direct, repeats)
    row.notes.append(
        "The goal names no model. Six times is what is won where the cost of a call rules: it is judged at "
        f"{next(iter(models))}. Where arithmetic does, as with a larger model on a CPU, batching wins what a wider "
        "matrix product wins: the samples say how much."
    )
    return row


async def _one_model(row: Row, name: str, model: Path, direct: Call, repeats: int) -> None:
    from components.embed_worker import EmbedConfig, tokenized
    from dynamo_epd.batching import Batcher, one_thread
    from dynamo_epd.text.t5 import TextEncoder

    config = EmbedConfig(model=str(model))
    thread = one_thread()
    limits = {"max_tokens": config.max_tokens, "batch_tokens": config.batch_tokens}
    encoder = thread.submit(TextEncoder, config.model, dtype="float32", **limits).result()
    batcher = Batcher(encoder.encode, most=config.batch_tokens, waiting=config.max_waiting, weight=len, thread=thread)
    texts = short_texts(TEXTS)
    settled()

    async def ours(those: Sequence[str]) -> tuple[float, list[numpy.ndarray]]:
        """As `EmbedWorker.embed` does it."""
        began = time.perf_counter()
        items = await tokenized(encoder.tokenize, those, config.max_tokens)
        done = await batcher.submit_all(items)
        seconds = time.perf_counter() - began
        return seconds, [one.result.vector.numpy() for one in done]

    async def directly(method: str, given: Sequence[str] | str) -> tuple[float, list[numpy.ndarray]]:
        return direct(method, given)

    ways: dict[str, Callable[[], Awaitable[tuple[float, list[numpy.ndarray]]]]] = {
        "embed worker": lambda: ours(texts),
        "one by one": lambda: directly("one_by_one", texts),
        f"fixed batches of {FIXED}": lambda: directly("in_batches", texts),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(WARM_UP + repeats):
        vectors: dict[str, numpy.ndarray] = {}
        for way, run in rotated(ways, repeat):
            took: list[float] = []
            while len(took) < ROUNDS and sum(took) < ROUNDS_SECONDS:
                one, found = await run()
                took.append(one)
            vectors[way] = numpy.array(found)
            if repeat >= WARM_UP:
                seconds[way].append(sorted(took)[len(took) // 2])
        for way, those in vectors.items():
            if numpy.abs(those - vectors["one by one"]).max() > CLOSE:
                row.void = f"{name}: the vectors of the {way} differ from those of one by one"
    alone: dict[str, list[float]] = {"embed worker": [], "direct call": []}
    for repeat in range(repeats):
        of: dict[str, list[float]] = {way: [] for way in alone}
        for number, text in enumerate(short_texts(SINGLES, seed=11), repeat):
            for way in alone if number % 2 else reversed(alone):
                seconds_taken, _ = await (ours([text]) if way == "embed worker" else directly("one", text))
                of[way].append(seconds_taken)
        for way, values in of.items():
            alone[way].append(sorted(values)[len(values) // 2])
    batcher.close()
    for what, by_way in ((f"{TEXTS} texts", seconds), ("one text", alone)):
        row.samples += [
            Samples(f"{name}, {what}, {way}", [1e3 * one for one in of], "ms") for way, of in by_way.items()
        ]
    faster = ratios(seconds["one by one"], seconds["embed worker"])
    slower = ratios(alone["embed worker"], alone["direct call"])
    what = f"{name}, one by one against the embed worker"
    if row.goals:
        row.samples.append(Samples(what, faster, "times"))
    else:
        row.goals.append(Goal(what, faster, "≥", 6.0))
    row.goals.append(Goal(f"{name}, one text against a direct call", slower, "≤", 1.05))


class Direct:
    """A T5 encoder as transformers' users call it, pooled as `TextEncoder` pools."""

    def __init__(self, model: Path):
        import torch
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForTextEncoding.from_pretrained(model, dtype=torch.float32).eval()

    def one(self, text: str) -> numpy.ndarray:
        """A vector of length 1, as the others'."""
        return self._forward([text])[0]

    def one_by_one(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        return [self.one(text) for text in texts]

    def in_batches(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """In the order of ``texts``."""
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        found: dict[int, numpy.ndarray] = {}
        for start in range(0, len(order), FIXED):
            indices = order[start : start + FIXED]
            found |= zip(indices, self._forward([texts[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(texts))]

    def _forward(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        import torch

        with torch.inference_mode():
            given = self._tokenizer(list(texts), padding=True, return_tensors="pt")
            states = self._model(**given).last_hidden_state
            mask = given["attention_mask"][:, :, None]
            vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            return list(vectors.numpy())
