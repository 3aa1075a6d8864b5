# SPDX-License-Identifier: Apache-2.0
"""The recipe of `models/tiny/t5`: a small T5 encoder whose pooled vectors say whether two texts mean the same picture.

    python -m models.t5

Contrastive: a caption and its paraphrase come close, and away from the other texts of the batch and from hard
negatives: the same words with one attribute changed, or with attributes swapped between two things. Beside it, heads
on every token: a picture is made from the states, and learns several times as fast from states that say plainly what
is in it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import Unigram
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer

from models import world
from models.training import Run, device, share_cores

DIRECTORY = Path("models/tiny/t5")
SEED = 2
STEPS = 4000
BATCH = 32
NEGATIVES = 3
"""Hard negatives of each text."""
PAIRS = 0.6
"""Part of the scenes with two things: they are the hard ones."""
RATE = 1e-3
TEMPERATURE = 0.05
HEADS = 0.2
"""Weight of the attribute heads, which are thrown away, beside the contrastive loss."""
VOCABULARY = 600
PLAIN_TEXT = Path("LICENSE")
TEXTS = 4000
"""Texts of the world that the tokenizer learns from."""


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer on the world's wording and a little plain text.

    T5's class has no byte fallback: every printable ASCII and Latin-1 character is a piece of its own, so that only
    other scripts become ``<unk>``.
    """
    chance = random.Random(SEED)
    scenes = world.scenes(chance, held_out=False, pairs=0.5)
    texts = []
    for _ in range(TEXTS):
        scene = next(scenes)
        texts += [_typed(scene.caption, chance), _typed(world.paraphrase(scene, chance), chance)]
    words = Counter(word.strip(".,") for text in texts for word in text.split())
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    characters = sorted({chr(code) for code in (*range(33, 127), *range(161, 256))} - {"\u00ad"})
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + PLAIN_TEXT.read_text().splitlines(), trainer)
    pieces = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    # The trainer leaves out words that others make up cheaply; the world's are few enough to be one piece each.
    known = {piece for piece, _ in pieces}
    pieces += [(f"▁{word}", math.log(n / words.total())) for word, n in words.items() if f"▁{word}" not in known]
    rare = min(score for _, score in pieces) - 1.0
    pieces += [(character, rare) for character in characters if character not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def build_model(size: int) -> T5EncoderModel:
    """An untrained encoder (T5 v1.1: gated GELU) with a vocabulary of ``size`` pieces."""
    torch.manual_seed(SEED)
    return T5EncoderModel(
        T5Config(
            vocab_size=size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def encode(
    model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (texts, tokens, d_model), and which are of real tokens (texts, tokens, 1); float32."""
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state.float()
    return states, batch.attention_mask[..., None].float()


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unit vectors (texts, d_model): the mean of each text's states, padding left out."""
    return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embed(model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Unit vectors (texts, d_model), float32."""
    return pooled(*encode(model, tokenizer, texts))


THINGS = tuple(itertools.product(world.SIZES, world.COLOURS, world.SHAPES))


class WithHeads(nn.Module):
    """The encoder and, for every token, what the whole text says: its background, and of the thing named first and of
    the one named second, each thing, size, colour and shape whether it is that. What a picture is made from then
    stands in every state, where one layer can read it."""

    def __init__(self, encoder: T5EncoderModel):
        super().__init__()
        self.encoder = encoder
        self.background = nn.Linear(encoder.config.d_model, len(world.COLOURS))
        parts = len(THINGS) + len(world.SIZES) + len(world.COLOURS) + len(world.SHAPES)
        self.things = nn.Linear(encoder.config.d_model, 2 * parts)

    def error(self, states: torch.Tensor, mask: torch.Tensor, scenes: list[world.Scene]) -> torch.Tensor:
        """states (texts, tokens, d_model) of ``scenes``, mask (texts, tokens, 1). Returns the mean over real tokens."""
        tokens = states.shape[1]
        backgrounds = torch.tensor([list(world.COLOURS).index(scene.background) for scene in scenes])
        backgrounds = backgrounds.to(states.device)[:, None].expand(-1, tokens)
        wrong = functional.cross_entropy(self.background(states).transpose(1, 2), backgrounds, reduction="none")
        named = torch.tensor([_named(scene, 0) + _named(scene, 1) for scene in scenes], device=states.device)
        missed = functional.binary_cross_entropy_with_logits(
            self.things(states), named[:, None].expand(-1, tokens, -1), reduction="none"
        )
        return ((wrong + missed.sum(-1)) * mask[..., 0]).sum() / mask.sum()


def _named(scene: world.Scene, index: int) -> list[float]:
    """What the scene's thing ``index`` is, as ones among zeros; all zero where there is none."""
    thing = None
    if index < len(scene.things):
        one = scene.things[index]
        thing = (one.size, one.colour, one.shape)
    return [float(one == thing) for one in THINGS] + [
        float(thing is not None and name in thing) for name in (*world.SIZES, *world.COLOURS, *world.SHAPES)
    ]


def triples(count: int, *, seed: int = SEED, pairs: float = 0.5) -> list[tuple[str, str, str, str]]:
    """Held-out texts to judge by: a caption, its paraphrase, then each with the same one attribute changed."""
    chance = random.Random(f"triples {seed}")
    scenes = world.scenes(chance, held_out=True, pairs=pairs)
    found = []
    for _ in range(count):
        scene = next(scenes)
        other, _ = world.changed(scene, chance)
        wording = chance.getrandbits(32)
        same, differing = (world.paraphrase(one, random.Random(wording)) for one in (scene, other))
        found.append((scene.caption, same, other.caption, differing))
    return found


@torch.no_grad()
def evaluate(
    model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str, str, str]]
) -> dict[str, float]:
    """Parts of the triples in which the paraphrase is closer than the text with one attribute changed.

    from_caption: the caption to its paraphrase, against the caption to the changed caption; from_paraphrase: the
    paraphrase to its caption, against the paraphrase to the changed paraphrase in the same wording; crossed: the
    caption to its paraphrase, against the caption to the changed paraphrase. both: the first two at once.
    """
    caption, same, other, differing = (embed(model, tokenizer, list(column)) for column in zip(*texts, strict=True))
    right = (caption * same).sum(-1)
    from_caption = right > (caption * other).sum(-1)
    from_paraphrase = right > (same * differing).sum(-1)
    crossed = right > (caption * differing).sum(-1)
    return {
        "from_caption": from_caption.float().mean().item(),
        "from_paraphrase": from_paraphrase.float().mean().item(),
        "crossed": crossed.float().mean().item(),
        "both": (from_caption & from_paraphrase).float().mean().item(),
    }


def _typed(text: str, chance: random.Random) -> str:
    """The text as people type it: sometimes with a capital letter or a full stop."""
    if chance.random() < 0.2:
        text = text[0].upper() + text[1:]
    return f"{text}." if chance.random() < 0.2 else text


def _worded(scene: world.Scene, wording: str) -> tuple[world.Scene, str]:
    """The scene with its things in the text's order, and the text, in the wording that the source of chance
    ``wording`` gives: alike for two scenes, in the same words."""
    chance = random.Random(wording)
    if chance.random() < 0.4:
        return scene, _typed(scene.caption, chance)
    scene = world.reordered(scene, chance)
    return scene, _typed(world.worded(scene, chance), chance)


def _swapped(scene: world.Scene, chance: random.Random) -> world.Scene:
    """The scene with one attribute swapped between its two things; one attribute changed where that is the same."""
    if len(scene.things) == 2:
        left, right = scene.things
        what = chance.choice(("size", "colour", "shape"))
        things = (replace(left, **{what: getattr(right, what)}), replace(right, **{what: getattr(left, what)}))
        if set(things) != set(scene.things):
            return world.Scene(things, scene.background)
    return world.changed(scene, chance)[0]


def _loss(
    model: WithHeads, tokenizer: PreTrainedTokenizerBase, chance: random.Random
) -> tuple[torch.Tensor, dict[str, float]]:
    scenes = world.scenes(chance, held_out=False, pairs=PAIRS)
    lefts, rights, negatives = [], [], []
    for _ in range(BATCH):
        scene = next(scenes)
        wordings = [str(chance.getrandbits(32)) for _ in range(2)]
        lefts.append(_worded(scene, wordings[0]))
        rights.append(_worded(scene, wordings[1]))
        for index in range(NEGATIVES):
            other = _swapped(scene, chance) if index == 0 else world.changed(scene, chance)[0]
            negatives.append(_worded(other, wordings[index % 2]))
    named, texts = zip(*lefts, *rights, *negatives, strict=True)
    states, mask = encode(model.encoder, tokenizer, list(texts))
    error = model.error(states, mask, list(named))
    vectors = pooled(states, mask)
    left, right, negative = vectors.split((BATCH, BATCH, BATCH * NEGATIVES))
    labels = torch.arange(BATCH, device=vectors.device)
    losses, hits = [], []
    for anchor, match in ((left, right), (right, left)):
        likeness = anchor @ torch.cat((match, negative)).T / TEMPERATURE
        losses.append(functional.cross_entropy(likeness, labels))
        hits.append((likeness.argmax(-1) == labels).float().mean().item())
    return (losses[0] + losses[1]) / 2 + HEADS * error, {"right": sum(hits) / 2, "heads": error.item()}


def main() -> None:
    """Train what is not yet trained, judge it, and write the directory."""
    share_cores("t5")
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    whole = WithHeads(model)
    run = Run("t5", whole, STEPS, RATE)
    run.train(lambda chance: _loss(whole, tokenizer, chance))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    model.cpu().save_pretrained(DIRECTORY)
    tokenizer.backend_tokenizer.no_padding()  # as the last batch was tokenized is nobody's default
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(DIRECTORY)
    figures = evaluate(model, tokenizer, triples(2000))
    recipe = {
        "command": "python -m models.t5",
        "seed": SEED,
        "hold_out_seed": world.HOLD_OUT_SEED,
        "steps": STEPS,
        "batch": BATCH,
        "device": device().type,
        "minutes": round(run.seconds / 60, 1),
        "held_out_triples": {"count": 2000, **{name: round(value, 4) for name, value in figures.items()}},
        "curve": run.curve,
    }
    (DIRECTORY / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"{DIRECTORY}: {figures}")


if __name__ == "__main__":
    main()
