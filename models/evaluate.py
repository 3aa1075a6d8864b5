# SPDX-License-Identifier: Apache-2.0
"""Judges the tiny models on what they were never trained on, by plain calls of transformers and diffusers.

    python -m models.evaluate [llava|t5|image|together|all] [--sample N]

Prints every figure with its goal, and writes beside the weights what was asked and got, case by case (`results.jsonl`),
the figures (`figures.json`) and the model card. A sample is the first N cases of every figure; it writes nothing.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, T5EncoderModel

from models import cards, checker, renderer, world
from models.world import Question, Scene

DIRECTORY = Path("models/tiny")
SEED = 20261123
SIDES = (64, 64, 96, 160)
"""Pictures are shown to LLaVA in these sizes."""
BATCH = 50
PAINTED = 10
"""Pictures drawn at once."""
LONGEST = 40
"""New tokens of an answer: two things take half of it."""
GUIDANCE = 1.5
"""The class's default is for photographs: it makes edges fray here."""
SHEET = 64
TOGETHER = "prompt, picture, caption"

Paint = Callable[[Scene, random.Random], Image.Image]


class Result(NamedTuple):
    """One case. ``shown``: what its pictures show. ``parts``: verdicts that are counted by themselves too, by the kind
    of question or by attribute."""

    figure: str
    shown: list[str]
    asked: str
    expected: str
    got: str
    right: bool
    parts: dict[str, bool]


def held_out(figure: str, count: int, pairs: float) -> Iterator[tuple[Scene, random.Random]]:
    """Scenes that no model was trained on, each with its case's own source of chance."""
    scenes = world.scenes(random.Random(f"{SEED} {figure}"), held_out=True, pairs=pairs)
    for index, scene in enumerate(itertools.islice(scenes, count)):
        yield scene, random.Random(f"{SEED} {figure} {index}")


def prompts(count: int) -> list[Scene]:
    """Held-out scenes of one thing, all 67 before any comes again."""
    chance = random.Random(f"{SEED} prompts")
    every = [Scene((thing,), ground) for thing, ground in world.COMBINATIONS if (thing, ground) in world.HELD_OUT]
    rounds = math.ceil(count / len(every))
    return [scene for _ in range(rounds) for scene in chance.sample(every, len(every))][:count]


class Asked(NamedTuple):
    """What LLaVA is shown and asked."""

    figure: str
    part: str
    question: Question
    scenes: list[Scene]
    pictures: list[Image.Image]


def drawn(scene: Scene, chance: random.Random) -> Image.Image:
    return world.draw(scene, chance, chance.choice(SIDES)).image


def captions(figure: str, part: str, pairs: float, count: int, paint: Paint) -> Iterator[Asked]:
    for scene, chance in held_out(f"{figure} {part}", count, pairs):
        yield Asked(figure, part, world.describe(scene, chance), [scene], [paint(scene, chance)])


def questions(figure: str, count: int, paint: Paint) -> Iterator[Asked]:
    for scene, chance in held_out(figure, count, 0.5):
        question = world.question(scene, chance)
        while question.about == "caption":  # no words point at that thing alone
            question = world.question(scene, chance)
        yield Asked(figure, question.about, question, [scene], [paint(scene, chance)])


def one_of_two(figure: str, count: int) -> Iterator[Asked]:
    """Two pictures, one or both of held-out scenes."""
    for scene, chance in held_out(figure, count, 0.4):
        other = next(world.scenes(chance, held_out=chance.random() < 0.5, pairs=0.4))
        first, second = chance.sample((scene, other), 2)
        question = world.second_of_two(first, second, chance)
        pictures = [drawn(first, chance), drawn(second, chance)]
        yield Asked(figure, question.text.split()[2], question, [first, second], pictures)


def differences(figure: str, count: int) -> Iterator[Asked]:
    for scene, chance in held_out(figure, count, 0):
        other, what = world.changed(scene, chance)
        first, second = chance.sample((scene, other), 2)
        question = world.what_differs(first, second, what)
        yield Asked(figure, what, question, [first, second], [drawn(first, chance), drawn(second, chance)])


class Llava:
    """The checkpoint in float32, answering greedily."""

    def __init__(self) -> None:
        self._model = LlavaForConditionalGeneration.from_pretrained(there("llava"), dtype=torch.float32).eval()
        self._processor = AutoProcessor.from_pretrained(there("llava"))
        self._processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def answers(self, asked: list[Asked]) -> list[str]:
        conversations = []
        for index, one in enumerate(asked):
            content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in one.pictures]
            # Half of the messages begin with their text, half with their pictures.
            content.insert(index % 2 * len(content), {"type": "text", "text": one.question.text})
            conversations.append([{"role": "user", "content": content}])
        inputs = self._processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        tokens = self._model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        said = self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in said]


def judge_llava(most: int) -> Iterator[Result]:
    model = Llava()
    cases = itertools.chain(
        captions("captions", "one thing", 0, min(400, most), drawn),
        captions("captions", "two things", 1, min(400, most), drawn),
        questions("questions", min(800, most), drawn),
        captions("another renderer: captions", "", 0.5, min(200, most), renderer.render),
        questions("another renderer: questions", min(200, most), renderer.render),
        one_of_two("two pictures: describe one", min(200, most)),
        differences("two pictures: what differs", min(200, most)),
    )
    for batch in batches(cases, BATCH):
        for case, answer in zip(batch, model.answers(batch), strict=True):
            expected = case.question.answer
            right = answer == expected
            parts = {case.part: right} if case.part else {}
            shown = [scene.caption for scene in case.scenes]
            yield Result(case.figure, shown, case.question.text, expected, answer, right, parts)


@torch.inference_mode()
def judge_t5(most: int) -> Iterator[Result]:
    model = T5EncoderModel.from_pretrained(there("t5"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(there("t5"))

    def vectors(texts: list[str]) -> torch.Tensor:
        """Means of the token states, of unit length."""
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        mask = inputs.attention_mask[:, :, None].float()
        states = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    for figure, pairs in (("one thing", 0.0), ("two things", 1.0)):
        for batch in batches(held_out(f"triples of {figure}", min(2000, most), pairs), BATCH):
            scenes = [scene for scene, _ in batch]
            same = [world.paraphrase(scene, chance) for scene, chance in batch]
            changes = [world.changed(scene, chance) for scene, chance in batch]
            anchors = vectors([scene.caption for scene in scenes])
            near = (anchors * vectors(same)).sum(-1).tolist()
            far = (anchors * vectors([other.caption for other, _ in changes])).sum(-1).tolist()
            for index, scene in enumerate(scenes):
                other, what = changes[index]
                right = near[index] > far[index]
                got = f"{near[index]:.4f} {'>' if right else '≤'} {far[index]:.4f}"
                yield Result(figure, [], scene.caption, f"{same[index]} > {other.caption}", got, right, {what: right})


class Painter:
    """The pipeline, called as its class's defaults have it but for the guidance."""

    def __init__(self) -> None:
        self._pipeline = DiffusionPipeline.from_pretrained(there("image"), dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        taken = inspect.signature(self._pipeline.__call__).parameters
        # Bins are of pictures of 256 pixels and more; what cleans captions of markup is another package's.
        self._options: dict[str, Any] = {
            name: False for name in ("use_resolution_binning", "clean_caption") if name in taken
        }
        self._options["guidance_scale"] = GUIDANCE

    def pictures(self, prompts: Iterable[str]) -> Iterator[Image.Image]:
        """One a prompt; the k-th is drawn from seed k."""
        for batch in batches(enumerate(prompts), PAINTED):
            seeds = [torch.Generator().manual_seed(index) for index, _ in batch]
            yield from self._pipeline([prompt for _, prompt in batch], generator=seeds, **self._options).images


def judge_image(most: int) -> Iterator[Result]:
    painter = Painter()
    pairs = [scene for scene, _ in held_out("prompts of two things", min(100, most), 1)]
    for figure, scenes in (("one thing", prompts(min(200, most))), ("two things", pairs)):
        for scene, picture in zip(scenes, painter.pictures(one.caption for one in scenes), strict=True):
            seen = checker.read(picture)
            parts = matches(scene, seen)
            right = all(parts.values()) and seen is not None and Counter(seen.things) == Counter(scene.things)
            if figure == "two things":
                parts["in the prompt's order"] = seen == scene
            yield Result(figure, [], scene.caption, scene.caption, worded(seen), right, parts)


def judge_together(most: int, sheet: list[cards.Cell]) -> Iterator[Result]:
    """The first pictures, with prompt and caption, are put into ``sheet``."""
    painter, model = Painter(), Llava()
    scenes = prompts(min(200, most))
    for batch in batches(zip(scenes, painter.pictures(one.caption for one in scenes), strict=True), BATCH):
        describe = Question("caption", "Describe the picture.", "")
        said = model.answers([Asked("", "", describe, [scene], [picture]) for scene, picture in batch])
        for (scene, picture), caption in zip(batch, said, strict=True):
            seen = checker.read(picture)
            if len(sheet) < SHEET:
                sheet.append(cards.Cell(picture, scene.caption, caption))
            parts = {
                "picture right by the checker": seen == scene,
                "caption right by the checker": caption == worded(seen),
            }
            right = caption == scene.caption
            yield Result(TOGETHER, [worded(seen)], scene.caption, scene.caption, caption, right, parts)


def worded(seen: Scene | None) -> str:
    return seen.caption if seen else "nothing clear"


def matches(wanted: Scene, seen: Scene | None) -> dict[str, bool]:
    """By attribute; with two things, of both: which of them is left is no part of a prompt's meaning."""
    if seen is None:
        return dict.fromkeys(("background", "size", "colour", "shape"), False)
    parts = {"background": seen.background == wanted.background}
    for what in ("size", "colour", "shape"):
        parts[what] = Counter(getattr(thing, what) for thing in seen.things) == Counter(
            getattr(thing, what) for thing in wanted.things
        )
    return parts


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def there(name: str) -> Path:
    if not (DIRECTORY / name).is_dir():
        raise SystemExit(f"{DIRECTORY / name} is not there: `make models` trains it")
    return DIRECTORY / name


def figures(name: str, results: list[Result]) -> dict[str, Any]:
    """Of every figure and its parts: how many cases, how many right; and the goal."""
    found: dict[str, Any] = {}
    for result in results:
        goal = GOALS[name][result.figure]
        figure = found.setdefault(result.figure, {"goal": goal, "of": 0, "right": 0, "parts": {}})
        figure["of"] += 1
        figure["right"] += result.right
        for part, right in result.parts.items():
            counted = figure["parts"].setdefault(part, {"of": 0, "right": 0})
            counted["of"] += 1
            counted["right"] += right
    return found


GOALS = {
    "llava": {
        "captions": 0.95,
        "questions": 0.95,
        "another renderer: captions": 0.9,
        "another renderer: questions": 0.9,
        "two pictures: describe one": 0.9,
        "two pictures: what differs": 0.9,
    },
    "t5": {"one thing": 0.99, "two things": 0.99},
    "image": {"one thing": 0.9, "two things": 0.9},
    "together": {TOGETHER: 0.9},
}


def evaluate(name: str, sample: int | None = None) -> dict[str, Any]:
    """Judge one of `GOALS`. Without a sample its results, figures, card and contact sheet are written.

    Every figure has: goal (a part of one), of (cases), right, and parts of {of, right}.
    """
    most = sample or sys.maxsize
    sheet: list[cards.Cell] = []
    judges: dict[str, Callable[[], Iterator[Result]]] = {
        "llava": lambda: judge_llava(most),
        "t5": lambda: judge_t5(most),
        "image": lambda: judge_image(most),
        "together": lambda: judge_together(most, sheet),
    }
    results = []
    for result in judges[name]():
        results.append(result)
        if len(results) % 100 == 0:
            print(f"{name}: {len(results)} cases", file=sys.stderr, flush=True)
    found = figures(name, results)
    if sample is None:
        directory = DIRECTORY / name
        directory.mkdir(exist_ok=True)
        lines = [json.dumps(result._asdict(), ensure_ascii=False) for result in results]
        (directory / "results.jsonl").write_text("\n".join(lines) + "\n")
        (directory / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
        if sheet:
            cards.contact_sheet(sheet).save(DIRECTORY / "contact-sheet.png", optimize=True)
        cards.write(DIRECTORY)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=[*GOALS, "all"])
    parser.add_argument("--sample", type=int, metavar="N", help="only the first N cases of every figure; write nothing")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for name in GOALS if arguments.what == "all" else [arguments.what]:
        found = evaluate(name, arguments.sample)
        print(f"\n## {name}\n\n{cards.table(found)}", flush=True)


if __name__ == "__main__":
    main()
