# SPDX-License-Identifier: Apache-2.0
"""What differs from model family to model family, in one table. A new family is one entry.

vLLM's model class and processor do the rest: placeholders, image sizes, token counts, weights. The table says only what
a stage must know that vLLM does not tell it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.sdk.config import ConfigError


@dataclass(frozen=True)
class Family:
    """One architecture, by the name in a checkpoint's ``config.json``.

    Attributes:
        architecture: ``architectures[0]``.
        placeholders: the texts that stand for an image in a prompt. Typed by a client they would be taken for one.
        hand_off: what the encode stage hands on. ``pixels`` where vLLM 0.31's model class has no path for embeddings:
            the stage then fetches, checks and decodes pictures, and the tower runs where the prompt is prefilled.
        decode_reads: what a decode engine needs of an image whose KV cache it takes over. ``metadata`` for models whose
            positions depend on the image's grid (mRoPE), ``nothing`` for the others.
    """

    architecture: str
    placeholders: tuple[str, ...]
    hand_off: Literal["embedding", "pixels"] = "embedding"
    decode_reads: Literal["nothing", "metadata"] = "nothing"


_QWEN_PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_INTERNVL_PLACEHOLDERS = ("<image>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>")

FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlavaForConditionalGeneration", ("<image>",)),
        Family("LlavaNextForConditionalGeneration", ("<image>",)),
        Family("Qwen2VLForConditionalGeneration", _QWEN_PLACEHOLDERS, decode_reads="metadata"),
        Family("Qwen2_5_VLForConditionalGeneration", _QWEN_PLACEHOLDERS, decode_reads="metadata"),
        Family("Qwen3VLForConditionalGeneration", _QWEN_PLACEHOLDERS, decode_reads="metadata"),
        Family("Qwen3VLMoeForConditionalGeneration", _QWEN_PLACEHOLDERS, decode_reads="metadata"),
        Family("Phi3VForCausalLM", tuple(f"<|image_{index}|>" for index in range(1, 33))),
        Family("InternVLChatModel", _INTERNVL_PLACEHOLDERS),
        Family("InternVLForConditionalGeneration", _INTERNVL_PLACEHOLDERS),
        # mllama4.py has no embeddings path, and Gemma 3's asserts against one (vLLM 0.31).
        Family(
            "Llama4ForConditionalGeneration",
            ("<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>"),
            hand_off="pixels",
        ),
        Family("Gemma3ForConditionalGeneration", ("<start_of_image>", "<image_soft_token>"), hand_off="pixels"),
    )
}


def family_of(architectures: list[str]) -> Family:
    """The family of a checkpoint. Raises ConfigError with the known ones where it is not in the table."""
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise ConfigError(f"no model family for {architectures}; known: {', '.join(sorted(FAMILIES))}")


def refuse_typed_placeholders(family: Family, texts: list[str]) -> None:
    """Raises InvalidRequest where a client's text holds a placeholder: it would be counted as an image."""
    for text in texts:
        for placeholder in family.placeholders:
            if placeholder in text:
                raise InvalidRequest(
                    f"the text contains {placeholder}, which stands for an image in this model's prompts; send images "
                    "as image_url parts",
                    param="messages",
                )
