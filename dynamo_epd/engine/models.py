# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes, made to take embeddings of several lengths in one step.

These architectures give pictures of different sizes different numbers of tokens. vLLM 0.31 hands their embeddings on as
they are, but first checks them against a schema that wants one length for all that meet in a step, from however many
requests; the check fails inside the engine and ends it. Here are the same classes without that check.
`dynamo_epd.engine.plugin` registers them.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.phi3v import Phi3VForCausalLM


class _AnyLength:
    """Goes before a model class of vLLM."""

    def embed_multimodal(self, **batch: Any) -> Any:
        """One (tokens, hidden) tensor an image; ``image_embeds`` are such, stacked where equally long."""
        embeddings = batch.get("image_embeds")
        if embeddings is not None:
            return list(embeddings)
        return super().embed_multimodal(**batch)  # type: ignore[misc]


class InternVL(_AnyLength, InternVLChatModel):
    pass


class InternVLHF(_AnyLength, InternS1ForConditionalGeneration):
    pass


class LlavaNext(_AnyLength, LlavaNextForConditionalGeneration):
    pass


class Phi3V(_AnyLength, Phi3VForCausalLM):
    pass
