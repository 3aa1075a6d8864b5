# SPDX-License-Identifier: Apache-2.0
"""Writes the model cards of `models/tiny`, from what the recipes and the evaluation wrote, and the contact sheet."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

POINTS = 8
"""Of a run's curve, in a card."""


class Card(NamedTuple):
    """What a card says beyond figures."""

    library: str
    pipeline: str
    title: str
    what: str
    limits: str


CARDS = {
    "llava": Card(
        library="transformers",
        pipeline="image-text-to-text",
        title="A tiny LLaVA that sees coloured shapes",
        what="""
`LlavaForConditionalGeneration`: a CLIP vision tower, LLaVA's projector and a Llama text model, small enough to train on
two cores. It answers `Describe the picture.` with a caption such as `a large red star on a blue background`, and
questions on colour, shape, size, background, number and presence. It tells two pictures apart.
""",
        limits="""
It knows only this world: one or two of six shapes in eight colours and two sizes on a plain ground, and the questions
that `models/world.py` words. Shown or asked anything else, it says something of that world all the same.
""",
    ),
    "t5": Card(
        library="transformers",
        pipeline="sentence-similarity",
        title="A tiny T5 encoder whose vectors tell captions apart",
        what="""
`T5EncoderModel` with its tokenizer. The mean of its token states, at unit length, is near for two wordings of one
picture, and further for captions that differ in one attribute. Its token states condition
[the image pipeline](../image).
""",
        limits="""
It knows only the captions of this world and the paraphrases of `models/world.py`. Vectors of other texts mean nothing.
""",
    ),
    "image": Card(
        library="diffusers",
        pipeline="text-to-image",
        title="A tiny text-to-image pipeline that paints coloured shapes",
        what="""
A pipeline of diffusers for 64 by 64 pixels: token states of [the T5 encoder](../t5) condition a transformer, trained by
x-prediction on the latents of its own VAE. Call it with `guidance_scale=1.5, use_resolution_binning=False`: the
class's defaults are for photographs of 1024 pixels. What judges its pictures is no model: `models/checker.py` reads
colours, shapes and sizes from the pixels, and what it cannot read counts as wrong.
""",
        limits="""
It knows only this world: prompts worded as `models/world.py` words captions, of one thing or two. Another seed moves
them a little and no more: one thing stands in the middle, two in opposite corners. Any other prompt gives some picture
of that world.
""",
    ),
}
TOGETHER = """
## Together with LLaVA

A held-out prompt becomes a picture, which [the tiny LLaVA](../llava) describes. Right is a caption that is the prompt.

{table}

{missed}`python -m models.evaluate together` prints them; [results.jsonl](../together/results.jsonl) has every case. The
first 64, prompt above caption:

![64 prompts with their pictures and captions](../contact-sheet.png)
"""


def write(directory: Path) -> None:
    """The README.md of every model in ``directory`` that has figures."""
    for name, card in CARDS.items():
        if (directory / name / "figures.json").exists():
            (directory / name / "README.md").write_text(text(directory, name, card))


def text(directory: Path, name: str, card: Card) -> str:
    own = directory / name
    recipe = json.loads((own / "recipe.json").read_text()) if (own / "recipe.json").exists() else {}
    found = json.loads((own / "figures.json").read_text())
    parts = [
        f"---\nlicense: apache-2.0\nlibrary_name: {card.library}\npipeline_tag: {card.pipeline}\n---",
        f"# {card.title}\n\n{card.what.strip()}",
        f"## Weights\n\n{weights(own)}",
        f"## Figures\n\nOn combinations of size, colour, shape and background that no model was trained on (a tenth of "
        f"all):\n\n{table(found)}\n\n{missed(found)}`python -m models.evaluate {name}` prints them; "
        "[results.jsonl](results.jsonl) has every case.",
    ]
    together = directory / "together" / "figures.json"
    if name == "image" and together.exists():
        ended = json.loads(together.read_text())
        parts.append(TOGETHER.strip().format(table=table(ended), missed=missed(ended)))
    if recipe:
        parts.append(training(recipe))
    parts += [
        f"## Limits\n\n{card.limits.strip()}",
        "## Licence\n\nApache-2.0. It was trained on drawn pictures and made-up text.",
    ]
    return "\n\n".join(parts) + "\n"


def table(found: dict[str, Any]) -> str:
    """Figures as a Markdown table, each with its parts."""
    lines = ["| figure | cases | right | goal |", "|---|---:|---:|---:|"]
    for name, figure in found.items():
        goal = f"≥ {figure['goal']:.0%}".replace("%", " %")
        lines.append(f"| **{name}** | {figure['of']} | **{percent(figure)}** | {goal} |")
        for part, counted in sorted(figure["parts"].items()):
            lines.append(f"| — {part} | {counted['of']} | {percent(counted)} | |")
    return "\n".join(lines)


def percent(counted: dict[str, Any]) -> str:
    return f"{100 * counted['right'] / counted['of']:.1f} %"


def missed(found: dict[str, Any]) -> str:
    """What is short of its goal, as a paragraph of its own."""
    short = [name for name, figure in found.items() if figure["right"] < figure["goal"] * figure["of"]]
    return f"Short of the goal: {', '.join(short)}.\n\n" if short else ""


def weights(directory: Path) -> str:
    """A table of the tensor files."""
    lines = ["| file | parameters | type | MB |", "|---|---:|---|---:|"]
    for path in sorted(directory.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (it is no mapping)
            count = sum(math.prod(one.get_shape()) for one in slices)
            types = ", ".join(sorted({one.get_dtype() for one in slices}))
        lines.append(f"| {path.relative_to(directory)} | {count:,} | {types} | {path.stat().st_size / 1e6:.1f} |")
    return "\n".join(lines)


def training(recipe: dict[str, Any]) -> str:
    """The command, what the recipe says of the run, and every phase's curve."""
    said = [f"## Training\n\n`{recipe['command']}` (`make models` runs all), by `models/` of the repository."]
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in plain(recipe).items() if name != "command"]
    said.append("\n".join(f"- {fact}" for fact in facts))
    for phase, curve in curves(recipe).items():
        count = min(POINTS, len(curve))
        chosen = [curve[round(index * (len(curve) - 1) / max(1, count - 1))] for index in range(count)]
        names = list(chosen[-1]) if chosen else []
        rows = [" | ".join(f"{point.get(name, ''):g}" for name in names) for point in chosen]
        lines = [f"| {' | '.join(names)} |", "|---:" * len(names) + "|", *(f"| {row} |" for row in rows)]
        said.append((f"The curve of `{phase}`:\n\n" if phase else "The curve:\n\n") + "\n".join(lines))
    return "\n\n".join(said)


def plain(recipe: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The recipe's single values, by path."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, dict):
            found |= plain(value, f"{before}{name} ")
        elif not isinstance(value, list):
            found[f"{before}{name}"] = value
    return found


def curves(recipe: dict[str, Any], before: str = "") -> dict[str, list[dict[str, float]]]:
    """The recipe's lists of points, by phase."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, value in recipe.items():
        path = before if name == "curve" else f"{before} {name}".strip()
        if isinstance(value, dict):
            found |= curves(value, path)
        elif isinstance(value, list) and value:
            found[path] = value
    return found


class Cell(NamedTuple):
    """One picture of the contact sheet."""

    picture: Image.Image
    prompt: str
    caption: str


COLUMNS = 8
SHOWN = 144
"""Pixels of a picture's side in the sheet."""
LINE = 13
LETTERS = 26
"""In a line."""


def contact_sheet(cells: list[Cell]) -> Image.Image:
    """Pictures in rows of eight, the prompt under each, and under it the caption: green where it is the prompt."""
    wide, high = SHOWN + 16, SHOWN + 4 * LINE + 18
    rows = math.ceil(len(cells) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide + 16, rows * high + 16), (128, 128, 128))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    pen.rectangle((0, 0, *sheet.size), (235, 235, 235))
    for index, cell in enumerate(cells):
        x, y = 16 + index % COLUMNS * wide, 16 + index // COLUMNS * high
        sheet.paste(cell.picture.convert("RGB").resize((SHOWN, SHOWN), Image.Resampling.NEAREST), (x, y))
        y += SHOWN + 3
        for words, colour in (
            (cell.prompt, (0, 0, 0)),
            (cell.caption, (0, 120, 0) if cell.caption == cell.prompt else (200, 0, 0)),
        ):
            for line in textwrap.wrap(words, LETTERS)[:2]:
                pen.text((x, y), line, colour, font)
                y += LINE
    return sheet
