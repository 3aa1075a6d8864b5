# SPDX-License-Identifier: Apache-2.0
"""The recipe of `models/tiny/llava`: a small LLaVA that describes pictures of the world and answers questions on them.

    python -m models.llava

Two phases. First the vision tower alone, with a head on every patch: which background, and the shape, colour and size
of the thing that covers the patch. Taught through captions only, shapes come last and late. Then the whole LLaVA on
conversations of several turns about one picture or two, with the loss on the answers.
"""

from __future__ import annotations

import json
import random
import re
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

from models import world
from models.training import Run, device
from models.untrained import rename_tensors

DIRECTORY = Path("models/tiny/llava")
SEED = 1
PATCH = 8
PATCHES = world.SIDE // PATCH
TOWER_STEPS = 3000
STEPS = 5000
TOWER_BATCH = 64
BATCH = 32
RATE = 1e-3
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

SMALL_TALK = (
    ("Hello", "Hello! Show me a picture."),
    ("Hi", "Hello! Show me a picture."),
    ("Who are you?", "I am a tiny model that describes pictures of shapes."),
    ("What can you do?", "I describe pictures of shapes and answer questions about them."),
    ("Describe the picture.", "There is no picture."),
    ("What is in this picture?", "There is no picture."),
    ("Thank you", "You are welcome."),
)
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You describe pictures.", "Be precise.")


class Turn(NamedTuple):
    """What the user says, with ``<image>`` for each picture, and the answer."""

    asked: str
    answer: str


class Talk(NamedTuple):
    """A conversation: a system message or nothing, turns, and the pictures in the order of the prompt."""

    system: str
    turns: list[Turn]
    pictures: list[Image.Image]


def sides(chance: random.Random) -> int:
    """Pictures come in any resolution."""
    return world.SIDE if chance.random() < 0.5 else chance.randint(48, 176)


def asked(text: str, pictures: int, chance: random.Random) -> str:
    """One user message: pictures and text in either order; now and then typed carelessly."""
    if chance.random() < 0.15:
        text = text.lower()
    if chance.random() < 0.15:
        text = text.rstrip(".?")
    parts = ["<image>"] * pictures
    return "\n".join([text, *parts] if chance.random() < 0.5 else [*parts, text])


def about_one(chance: random.Random, found: world.Scene) -> Talk:
    """Up to five turns about one picture."""
    questions = [world.describe(found, chance)] if chance.random() < 0.75 else []
    questions += [world.question(found, chance) for _ in range(chance.randint(1, 4) - len(questions))]
    questions = questions or [world.question(found, chance)]
    chance.shuffle(questions)
    turns = [
        Turn(asked(question.text, 1 if index == 0 else 0, chance), question.answer)
        for index, question in enumerate(questions)
    ]
    return Talk(system(chance), turns, [world.draw(found, chance, sides(chance)).image])


def about_two(chance: random.Random, scenes: Any) -> Talk:
    """Two pictures in one message, or one after the other."""
    first, second = next(scenes), next(scenes)
    way = chance.random()
    if way < 0.5:
        first = next(scene for scene in scenes if len(scene.things) == 1)
        second, what = differing(first, chance)
        questions = [world.what_differs(first, second, what), world.second_of_two(first, second, chance)]
    elif way < 0.85:
        questions = [world.second_of_two(first, second, chance), world.second_of_two(first, second, chance)]
    else:
        questions = [world.describe(first, chance), world.describe(second, chance)]
    seen = (1, 1) if way >= 0.85 else (2, 0)
    turns = [
        Turn(asked(question.text, shown, chance), question.answer)
        for question, shown in zip(questions, seen, strict=True)
    ]
    pictures = [world.draw(found, chance, sides(chance)).image for found in (first, second)]
    return Talk(system(chance), turns, pictures)


def differing(first: world.Scene, chance: random.Random) -> tuple[world.Scene, str]:
    """The scene with one attribute changed, of those that are trained on."""
    while True:
        second, what = world.changed(first, chance)
        if not second.held_out:
            return second, what


def system(chance: random.Random) -> str:
    return chance.choice(SYSTEM) if chance.random() < 0.1 else ""


def corpus() -> list[str]:
    """What the tokenizer's merges are learned from."""
    chance = random.Random(SEED)
    scenes = world.scenes(chance, held_out=False, pairs=0.5)
    lines = [line for pair in SMALL_TALK for line in pair] * 20 + list(SYSTEM) * 20
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
    covered = np.zeros((len(found.things) + 1, PATCHES, PATCHES))
    np.add.at(covered, (owner, edges[:, None], edges[None, :]), 1.0)
    covered /= covered.sum(0)
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
        drawn = [world.draw(scene, chance, sides(chance)) for scene in batch]
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

    run = Run("llava-tower", module, TOWER_STEPS, RATE)
    run.train(loss)
    return run


class Examples:
    """Conversations → what the model is trained on."""

    def __init__(self, words: PreTrainedTokenizerFast, pixels: Pixels):
        self._words = words
        self._pixels = pixels
        self._image = words.convert_tokens_to_ids("<image>")

    def tokens(self, talk: Talk) -> tuple[list[int], list[int]]:
        """Token ids, as the chat template words the conversation, and labels: the answers, the rest is ignored."""
        ids: list[int] = []
        labels: list[int] = []

        def say(text: str, learned: bool) -> None:
            found = self._words.encode(text, add_special_tokens=False)
            expanded = [one for token in found for one in [token] * (PATCHES**2 if token == self._image else 1)]
            ids.extend(expanded)
            labels.extend(expanded if learned else [IGNORED] * len(expanded))

        if talk.system:
            say(f"SYSTEM:\n{talk.system}\n", learned=False)
        for turn in talk.turns:
            say(f"USER:\n{turn.asked}\nASSISTANT:\n", learned=False)
            say(f"{turn.answer}</s>", learned=True)
        return ids, labels

    def batch(self, talks: list[Talk]) -> dict[str, torch.Tensor]:
        """Padded on the right: input_ids, attention_mask, labels int64 (n, longest); pixel_values of all pictures."""
        pairs = [self.tokens(talk) for talk in talks]
        longest = max(len(ids) for ids, _ in pairs)
        ids = torch.full((len(pairs), longest), self._words.pad_token_id)
        labels = torch.full((len(pairs), longest), IGNORED)
        for row, (one, right) in enumerate(pairs):
            ids[row, : len(one)] = torch.tensor(one)
            labels[row, : len(right)] = torch.tensor(right)
        mask = (torch.arange(longest) < torch.tensor([len(one) for one, _ in pairs])[:, None]).long()
        inputs = {"input_ids": ids.to(device()), "attention_mask": mask.to(device()), "labels": labels.to(device())}
        pictures = [picture for talk in talks for picture in talk.pictures]
        return {**inputs, "pixel_values": self._pixels(pictures)} if pictures else inputs


def talks(chance: random.Random) -> list[Talk]:
    """A batch of conversations of one kind: about one picture, two, or none."""
    kind = chance.random()
    found = world.scenes(chance, held_out=False, pairs=0.4)
    if kind < 0.75:
        return [about_one(chance, next(found)) for _ in range(BATCH)]
    if kind < 0.98:
        return [about_two(chance, found) for _ in range(BATCH // 2)]
    said = [chance.choice(SMALL_TALK) for _ in range(BATCH)]
    return [Talk(system(chance), [Turn(asked(text, 0, chance), answer)], []) for text, answer in said]


def train_whole(model: LlavaForConditionalGeneration, examples: Examples) -> Run:
    """Teach the language model to say what the tower sees; the tower goes on learning."""

    def loss(chance: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = examples.batch(talks(chance))
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        wanted = labels[:, 1:].flatten()
        kept = wanted != IGNORED
        said = logits[:, :-1].flatten(0, 1)[kept].float()
        right = (said.argmax(-1) == wanted[kept]).float().mean().item()
        return nn.functional.cross_entropy(said, wanted[kept]), {"tokens right": right}

    run = Run("llava", model, STEPS, RATE)
    run.train(loss)
    return run


def main() -> None:
    """Train what is not yet trained, and write the checkpoint."""
    made = processor()
    pixels = Pixels(made.image_processor)
    model = model_of(made.tokenizer)
    tower = train_tower(model.model.vision_tower, model.config.vision_config.hidden_size, pixels)
    whole = train_whole(model, Examples(made.tokenizer, pixels))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    model.float().cpu().save_pretrained(DIRECTORY)
    rename_tensors(DIRECTORY, "vision_tower.", "vision_tower.vision_model.")
    made.save_pretrained(DIRECTORY)
    recipe = {
        "command": "python -m models.llava",
        "seed": SEED,
        "parameters": sum(one.numel() for one in model.parameters()),
        "steps": {"tower": TOWER_STEPS, "whole": STEPS},
        "minutes": round((tower.seconds + whole.seconds) / 60, 1),
        "curve": {"tower": tower.curve, "whole": whole.curve},
    }
    text = re.sub(
        r"\{\s+([^{}\[\]]*?)\s+\}", lambda found: "{" + " ".join(found[1].split()) + "}", json.dumps(recipe, indent=1)
    )
    (DIRECTORY / "recipe.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
