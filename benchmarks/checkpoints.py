# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights in the sizes at which a row's effect exists, written when they are first needed.

All are LLaVAs, which every arm can serve. Only printable characters are ever said, one a token, and never the end: so
each token is a delta that a client sees, and an answer is as long as was asked for.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.arms import MAX_MODEL_LEN, WORK

PRINTABLE = range(33, 127)


@dataclass(frozen=True)
class Size:
    """Of a CLIP tower and of the Llama that reads it."""

    layers: int
    width: int
    heads: int
    side: int
    """Pixels."""
    patch: int
    text_layers: int
    text_width: int

    @property
    def image_tokens(self) -> int:
        """Of one picture, whatever its size: it is cropped to the tower's square."""
        return (self.side // self.patch) ** 2

    @property
    def prefill_of_encode(self) -> float:
        """Operations that a picture's tokens cost the Llama, as a multiple of those that the picture costs the tower.
        Counted are, for each token and layer, the weights and the two products of attention."""
        tokens, inner = self.image_tokens, 11 * self.text_width // 4
        tower = self.layers * (12 * self.width**2 + 2 * tokens * self.width)
        llama = self.text_layers * (4 * self.text_width**2 + 3 * self.text_width * inner + 2 * tokens * self.text_width)
        return llama / tower


SIZES = {
    "llava-tiny": Size(layers=2, width=64, heads=2, side=56, patch=14, text_layers=2, text_width=64),
    "llava-s16": Size(layers=12, width=384, heads=6, side=224, patch=16, text_layers=4, text_width=512),
    "llava-b32": Size(layers=12, width=768, heads=12, side=224, patch=32, text_layers=1, text_width=512),
    # One of the 24 layers of CLIP L/14-336, which are alike: all of them take a core six seconds a picture.
    "llava-l14-336": Size(layers=1, width=1024, heads=16, side=336, patch=14, text_layers=1, text_width=512),
}
TINY = "llava-tiny"
"""Of the rows on what a graph adds, where no arithmetic hides it: whole answers, starts, an echo."""
SERVED = "llava-s16"
"""Of the other rows that serve: a tower of ViT-S/16's size (22 M parameters, 196 tokens a picture) and a Llama of 13 M.
How many decode steps a picture costs by time shows row 8; by operations it would be more, but a step of so small a
model is overhead. By operations the prefill of its tokens costs about half of its encode."""


def directory(name: str) -> Path:
    """The directory of a key of `SIZES`, written unless it is there."""
    size = SIZES[name]
    return made(WORK / f"{name}-{hash_of(size):08x}", lambda path: write(size, path))


def made(path: Path, write: Callable[[Path], None]) -> Path:
    """``path``, absolute, written unless it is there: beside and then renamed, so that what is there is whole."""
    path = path.absolute()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            written = Path(beside, "made")
            write(written)
            written.rename(path)
    return path


def hash_of(size: Size) -> int:
    """Another size is another directory."""
    return zlib.crc32(repr(sorted(asdict(size).items())).encode())


def write(size: Size, directory: Path) -> None:
    """A LlavaForConditionalGeneration with its processor. The tower's last layer is the one that is read: every arm
    then runs all of its layers."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from models.untrained import LLAVA_TEMPLATE, byte_tokenizer, randomise, rename_tensors

    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], bos="<s>", eos="</s>", pad="<pad>")
    vision = CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=size.side,
        patch_size=size.patch,
    )
    text = LlamaConfig(
        vocab_size=320,
        hidden_size=size.text_width,
        intermediate_size=11 * size.text_width // 4,
        num_hidden_layers=size.text_layers,
        num_attention_heads=max(2, size.text_width // 64),
        num_key_value_heads=max(2, size.text_width // 64),
        max_position_embeddings=4 * MAX_MODEL_LEN,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=size.image_tokens,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed=1, std=1.6)
    said = torch.zeros(text.vocab_size, dtype=torch.bool)
    said[[tokenizer.convert_tokens_to_ids(chr(character)) for character in PRINTABLE]] = True
    with torch.no_grad():
        # Their logit is 0, and of a hundred random ones the largest is more.
        model.lm_head.weight[~said] = 0.0
    model.save_pretrained(directory)
    rename_tensors(directory, "vision_tower.", "vision_tower.vision_model.")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size.side}, crop_size={"height": size.side, "width": size.side}
        ),
        tokenizer=tokenizer,
        patch_size=size.patch,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
