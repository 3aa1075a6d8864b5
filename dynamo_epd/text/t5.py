# SPDX-License-Identifier: Apache-2.0
"""T5's encoder, by transformers: pooled vectors for comparing texts, states of every token for conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, T5EncoderModel

from dynamo_epd.errors import InvalidRequest

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class EncodedText:
    """One text.

    Attributes:
        vector: float32 (width,): the mean of the real tokens' states, of length 1.
        states: (tokens, width) in the model's dtype: the last hidden state, without padding.
    """

    vector: torch.Tensor
    states: torch.Tensor


class TextEncoder:
    """A T5 encoder with its tokenizer, from a directory or the hub.

    Args:
        dtype: ``auto``, which is the checkpoint's own on a GPU and float32 elsewhere, or a name.
        max_tokens: a longer text is refused.
    """

    def __init__(self, model: str, *, dtype: str = "auto", max_tokens: int = 512):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen: Any = DTYPES.get(dtype) or ("auto" if self._device.type == "cuda" else torch.float32)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = T5EncoderModel.from_pretrained(model, dtype=chosen).to(self._device).eval()
        self._max_tokens = max_tokens

    def tokenize(self, text: str, param: str) -> list[int]:
        """Token ids with T5's end mark. Raises `InvalidRequest`, naming ``param``, for too many."""
        ids: list[int] = self._tokenizer(text, truncation=False).input_ids
        if len(ids) > self._max_tokens:
            raise InvalidRequest(
                f"'{param}' has {len(ids)} tokens, {self._max_tokens} are the limit", param=param, code="text_too_long"
            )
        return ids

    @torch.inference_mode()
    def encode(self, texts: Sequence[list[int]]) -> list[EncodedText]:
        """One forward of token ids; a text's result does not depend on its neighbours, float rounding aside."""
        longest = max(len(ids) for ids in texts)
        padding = self._tokenizer.pad_token_id
        ids = torch.tensor([[*text, *[padding] * (longest - len(text))] for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        mask = torch.arange(longest, device=self._device) < lengths[:, None]
        states = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        kept = states.float() * mask[:, :, None]
        vectors = normalize(kept.sum(1) / lengths[:, None], dim=-1).cpu()
        rows = zip(vectors, states, texts, strict=True)
        return [EncodedText(vector, row[: len(text)].cpu()) for vector, row, text in rows]
