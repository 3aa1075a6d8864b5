# SPDX-License-Identifier: Apache-2.0
"""The recipe of `models/tiny/llava`: a small LLaVA that describes pictures of the world and answers questions on them.

    python -m models.llava

Four phases. First the vision tower alone, with a head on every patch: which background, and the shape, colour and size
of the thing that covers the patch. Taught through captions only, shapes come last and late. Then the whole LLaVA on
conversations of several turns about one picture or two, with the loss on the answers. There a caption often stands
before a question, and the answer is read off it; so then come questions with nothing said before them, many to a
picture; and at last a little of everything, mostly what differs between two pictures.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from models import talks, world
from models.talks import Talk
from models.training import Run, device, fuse, share_cores
from models.untrained import rename_tensors

DIRECTORY = Path("models/tiny/llava")
SEED = 1
PATCH = 8
PATCHES = world.SIDE // PATCH
TOWER_STEPS = 2000
STEPS = 2000
QUESTION_STEPS = 2500
TOWER_BATCH = 64
TOWER_RATE = 2e-3
RATE = 1e-3
QUESTION_RATE = 7e-4
LAST_STEPS = 4000
LAST_RATE = 7e-4
LAYER = -2
"""The tower's layer that the language model sees, as in LLaVA 1.5."""
IGNORED = -100

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}:\n"
    "{% set end = '</s>' if message['role'] == 'assistant' else '\n' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{{ end }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{{ end }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)
"""An answer ends in ``</s>``, in a history too: it then is what training saw."""


def corpus() -> list[str]:
    """What the tokenizer's merges are learned from."""
    chance = random.Random(SEED)
    scenes = world.scenes(chance, held_out=False, pairs=0.5)
    lines = [line for pair in talks.SMALL_TALK for line in pair] * 20 + list(talks.SYSTEM) * 20
    for found, _ in zip(scenes, range(3000), strict=False):
        asking = world.question(found, chance)
        lines += [f"USER:\n{asking.text}\nASSISTANT:\n{asking.answer}\n", world.describe(found, chance).text]
        lines += [found.caption, world.paraphrase(found, chance)]
    return lines


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the world's words are one token each, and any other text has tokens too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=508, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(corpus(), trainer)
    core.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<pad>", "<image>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def processor() -> LlavaProcessor:
    """A picture becomes 64×64 pixels: its shorter side resized, the middle of the longer one."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": world.SIDE}, crop_size={"height": world.SIDE, "width": world.SIDE}
        ),
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def model_of(words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """2.3 million parameters: a CLIP tower of 5 layers (the language model sees the fourth) and a Llama of 4."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=world.SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES**2,
        vision_feature_layer=LAYER,
    )
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # at this size a CPU's fused attention takes 70 % longer, backwards mostly
    return model


class Pixels:
    """Pictures → float32 (n, 3, 64, 64), by the resampling and scaling of the checkpoint's own image processor."""

    def __init__(self, images: Any):
        self._resample = images.resample
        self._mean = np.array(images.image_mean, dtype=np.float32)
        self._deviation = np.array(images.image_std, dtype=np.float32)

    def __call__(self, pictures: list[Image.Image]) -> torch.Tensor:
        square = (world.SIDE, world.SIDE)
        resized = np.stack([np.asarray(picture.resize(square, self._resample)) for picture in pictures])
        scaled = (resized.astype(np.float32) / 255 - self._mean) / self._deviation
        return torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous().to(device())


class TowerWithHeads(nn.Module):
    """The vision tower and, for every patch, what the thing on it is: classes of each attribute, the last is none."""

    def __init__(self, tower: CLIPVisionModel, width: int):
        super().__init__()
        self.tower = tower
        self.heads = nn.ModuleDict(
            {
                "background": nn.Linear(width, len(world.COLOURS)),
                "shape": nn.Linear(width, len(world.SHAPES) + 1),
                "colour": nn.Linear(width, len(world.COLOURS) + 1),
                "size": nn.Linear(width, len(world.SIZES) + 1),
                "owner": nn.Linear(width, 3),
            }
        )

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:]
        return {name: head(hidden) for name, head in self.heads.items()}


COVERED = 0.15
"""Part of a patch that a thing must cover to be what the patch shows."""


def patch_labels(found: world.Scene, owner: np.ndarray) -> dict[str, np.ndarray]:
    """The right class of every attribute for every patch, int64 (64,) each."""
    height = owner.shape[0]
    edges = (np.arange(height) * PATCHES // height).astype(np.int64)
    cells = (owner.astype(np.int64) * PATCHES + edges[:, None]) * PATCHES + edges[None, :]
    number = len(found.things) + 1
    covered = np.bincount(cells.ravel(), minlength=number * PATCHES**2).reshape(number, PATCHES, PATCHES)
    covered = covered / covered.sum(0)
    best = covered[1:].argmax(0) + 1
    which = np.where(covered[1:].max(0) >= COVERED, best, 0).reshape(-1)

    def classes(names: list[str], values: list[str]) -> np.ndarray:
        table = np.array([len(names), *(names.index(value) for value in values)])
        return table[which]

    background = list(world.COLOURS).index(found.background)
    return {
        "background": np.full(PATCHES**2, background),
        "shape": classes(list(world.SHAPES), [thing.shape for thing in found.things]),
        "colour": classes(list(world.COLOURS), [thing.colour for thing in found.things]),
        "size": classes(list(world.SIZES), [thing.size for thing in found.things]),
        "owner": which,
    }


def train_tower(tower: CLIPVisionModel, width: int, pixels: Pixels) -> Run:
    """Teach the tower to see, by attribute heads that are thrown away."""
    module = TowerWithHeads(tower, width)

    def loss(chance: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        found = world.scenes(chance, held_out=False, pairs=0.4)
        batch = [next(found) for _ in range(TOWER_BATCH)]
        drawn = [world.draw(scene, chance, talks.sides(chance)) for scene in batch]
        labels = [patch_labels(scene, picture.owner) for scene, picture in zip(batch, drawn, strict=True)]
        outputs = module(pixels([picture.image for picture in drawn]))
        total = torch.zeros((), device=device())
        shown = {}
        for name, output in outputs.items():
            right = torch.from_numpy(np.stack([label[name] for label in labels])).to(device())
            total = total + nn.functional.cross_entropy(output.flatten(0, 1).float(), right.flatten())
            if name == "shape":
                seen = right < len(world.SHAPES)
                shown["shape"] = (output.argmax(-1) == right)[seen].float().mean().item()
        return total, shown

    run = Run("llava-tower", module, TOWER_STEPS, TOWER_RATE, layers=tower.encoder.layers)
    run.train(loss)
    return run


class Row(NamedTuple):
    """One conversation as tokens. Each list has one entry for a token.

    labels: the token where it is learned, else `IGNORED`. part: 0 for what every token after it sees, k for what the
    k-th question of a quiz alone sees.
    """

    ids: list[int]
    labels: list[int]
    part: list[int]


class Examples:
    """Conversations → what the model is trained on."""

    def __init__(self, words: PreTrainedTokenizerFast, pixels: Pixels):
        self._words = words
        self._pixels = pixels
        self._encode = lru_cache(1 << 16)(partial(words.encode, add_special_tokens=False))
        self._image = words.convert_tokens_to_ids("<image>")

    def row(self, talk: Talk) -> Row:
        """The conversation's tokens, as the chat template words it, and labels: the answers, the rest is ignored."""
        row = Row([], [], [])

        def say(text: str, part: int = 0, *, learned: bool = False) -> None:
            found = self._encode(text)
            expanded = [one for token in found for one in [token] * (PATCHES**2 if token == self._image else 1)]
            row.ids.extend(expanded)
            row.labels.extend(expanded if learned else [IGNORED] * len(expanded))
            row.part.extend([part] * len(expanded))

        if talk.system:
            say(f"SYSTEM:\n{talk.system}\n")
        if talk.apart:
            say("USER:\n" + "<image>\n" * len(talk.pictures))
        for index, turn in enumerate(talk.turns, start=1):
            part = index if talk.apart else 0
            say(f"{turn.asked}\nASSISTANT:\n" if part else f"USER:\n{turn.asked}\nASSISTANT:\n", part)
            say(f"{turn.answer}</s>", part, learned=True)
        return row

    def halves(self, batch: list[Talk]) -> list[dict[str, torch.Tensor]]:
        """The shorter conversations and the longer ones apart: up to a quarter of one `batch` would be padding."""
        by_length = sorted(batch, key=lambda talk: len(self.row(talk).ids))
        middle = len(batch) // 2
        return [self.batch(half) for half in (by_length[:middle], by_length[middle:]) if half]

    def batch(self, batch: list[Talk]) -> dict[str, torch.Tensor]:
        """Padded on the right: input_ids, position_ids, labels int64 (n, longest); attention_mask float32 (n, 1,
        longest, longest), added to the scores; pixel_values of all pictures."""
        rows = [self.row(talk) for talk in batch]
        longest = max(len(row.ids) for row in rows)

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([one + [value] * (longest - len(one)) for one in lists])

        part = padded([row.part for row in rows], -1)
        before = part[:, None, :]
        sees = ((before == 0) | (before == part[:, :, None])) & torch.ones(longest, longest, dtype=torch.bool).tril()
        inputs = {
            "input_ids": padded([row.ids for row in rows], self._words.pad_token_id),
            "position_ids": (sees.sum(-1) - 1),
            "labels": padded([row.labels for row in rows], IGNORED),
            "attention_mask": torch.where(sees, 0.0, torch.finfo(torch.bfloat16).min)[:, None],
        }
        inputs = {name: one.to(device()) for name, one in inputs.items()}
        pictures = [picture for talk in batch for picture in talk.pictures]
        return {**inputs, "pixel_values": self._pixels(pictures)} if pictures else inputs


def train_whole(
    name: str,
    model: LlavaForConditionalGeneration,
    examples: Examples,
    draw: Callable[[random.Random], list[Talk]],
    steps: int,
    rate: float,
) -> Run:
    """Teach the language model to say what the tower sees; the tower goes on learning."""

    def loss(chance: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        total, right, learned = torch.zeros((), device=device()), 0, 0
        for inputs in examples.halves(draw(chance)):
            wanted = inputs.pop("labels")[:, 1:].flatten()
            kept = wanted != IGNORED
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            said = model.lm_head(hidden[:, :-1].flatten(0, 1)[kept]).float()
            total = total + nn.functional.cross_entropy(said, wanted[kept], reduction="sum")
            right += int((said.argmax(-1) == wanted[kept]).sum())
            learned += len(said)
        return total / learned, {"tokens right": right / learned}

    run = Run(name, model, steps, rate, layers=model.model.language_model.layers)
    run.train(loss)
    return run


def main() -> None:
    """Train what is not yet trained, and write the checkpoint."""
    share_cores("llava")
    made = processor()
    pixels = Pixels(made.image_processor)
    model = model_of(made.tokenizer)
    fuse([*model.model.vision_tower.encoder.layers, *model.model.language_model.layers])
    tower = train_tower(model.model.vision_tower, model.config.vision_config.hidden_size, pixels)
    examples = Examples(made.tokenizer, pixels)
    whole = train_whole("llava", model, examples, talks.conversations, STEPS, RATE)
    questions = train_whole("llava-questions", model, examples, talks.out_of_the_blue, QUESTION_STEPS, QUESTION_RATE)
    last = train_whole("llava-everything", model, examples, talks.everything, LAST_STEPS, LAST_RATE)
    runs = {
        "tower": tower,
        "whole": whole,
        "questions": questions,
        "everything": last,
    }
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    model.float().cpu().save_pretrained(DIRECTORY)
    rename_tensors(DIRECTORY, "vision_tower.", "vision_tower.vision_model.")
    made.save_pretrained(DIRECTORY)
    recipe = {
        "command": "python -m models.llava",
        "seed": SEED,
        "parameters": sum(one.numel() for one in model.parameters()),
        "steps": {name: run.steps for name, run in runs.items()},
        "minutes": round(sum(run.seconds for run in runs.values()) / 60, 1),
        "curve": {name: run.curve for name, run in runs.items()},
    }
    text = re.sub(
        r"\{\s+([^{}\[\]]*?)\s+\}", lambda found: "{" + " ".join(found[1].split()) + "}", json.dumps(recipe, indent=1)
    )
    (DIRECTORY / "recipe.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
