# SPDX-License-Identifier: Apache-2.0
"""T5's encoder, by transformers: pooled vectors for comparing texts, states of every token for conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

from dynamo_epd import weights
from dynamo_epd.errors import InvalidRequest
from dynamo_epd.sdk.config import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


T5_CLASSES = frozenset({"T5EncoderModel", "UMT5EncoderModel"})
T5_TYPES = frozenset({"t5", "umt5", "mt5"})

FORWARD_TOKENS = 256
"""One more forward is taken to cost as much as this many tokens of padding: about 120 were measured with the tiny T5 on
two CPU cores, about 250 are reckoned for T5-XXL on a GPU, for its launches and one reading of the weights."""


class TextEncoderError(ConfigError):
    """A model that is not there, or is no T5."""


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
    """A T5 encoder with its tokenizer.

    Args:
        model: a directory, a name on the hub, or ``s3://bucket/prefix``: a T5, or a pipeline of diffusers that has one.
        dtype: ``auto``, which is the checkpoint's own on a GPU and float32 elsewhere, or a name.
        max_tokens: a longer text is refused.
        batch_tokens: in one forward, with its padding; a longer text runs alone.

    Raises:
        TextEncoderError, WeightsError: what cannot be loaded, in one line.
    """

    def __init__(self, model: str, *, dtype: str = "auto", max_tokens: int = 512, batch_tokens: int = 16384):
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen: Any = DTYPES.get(dtype) or ("auto" if self._device.type == "cuda" else torch.float32)
        try:
            place = find(model)
            kind = AutoConfig.from_pretrained(place.model, subfolder=place.encoder).model_type
            if kind not in T5_TYPES:
                raise TextEncoderError(f"text encoder {model!r} is no T5 but {kind!r}")
            self._tokenizer = AutoTokenizer.from_pretrained(place.model, subfolder=place.tokenizer)
            loaded, report = AutoModelForTextEncoding.from_pretrained(
                place.model, subfolder=place.encoder, dtype=chosen, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:  # else they are drawn at random
                raise TextEncoderError(f"text encoder {model!r} has no weights for {min(report['missing_keys'])}")
        except ConfigError:
            raise
        except Exception as error:  # what a broken model raises is up to two libraries
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TextEncoderError(f"text encoder {model!r} cannot be loaded: {line}") from error
        # What the tokenizer's own call goes through in Python takes longer than the text does.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self._encode = backend.encode
        self._model = loaded.to(self._device).eval()
        self.vocabulary: int = loaded.config.vocab_size
        """Token ids lie below it."""
        self._max_tokens = max_tokens
        self._batch_tokens = batch_tokens

    def tokenize(self, text: str, param: str) -> list[int]:
        """Token ids with T5's end mark. Raises `InvalidRequest`, naming ``param``, for too many."""
        ids: list[int] = self._encode(text).ids
        if len(ids) > self._max_tokens:
            raise InvalidRequest(
                f"'{param}' has {len(ids)} tokens, {self._max_tokens} are the limit", param=param, code="text_too_long"
            )
        return ids

    @torch.inference_mode()
    def encode(self, texts: Sequence[list[int]]) -> list[EncodedText]:
        """Of token ids, one result a text, in order; it does not depend on the text's neighbours, float rounding aside.

        As many forwards as ``batch_tokens`` wants: memory goes by rows times the longest, in the position bias times
        the longest once more, and one long text among many short ones would pad all of them.
        """
        found: dict[int, EncodedText] = {}
        for indices in forwards([len(ids) for ids in texts], self._batch_tokens):
            found |= zip(indices, self._forward([texts[index] for index in indices]), strict=True)
        return [found[index] for index in range(len(texts))]

    def _forward(self, texts: Sequence[list[int]]) -> list[EncodedText]:
        counts = [len(ids) for ids in texts]
        longest, padding = max(counts), self._tokenizer.pad_token_id
        ids = torch.tensor([[*text, *[padding] * (longest - len(text))] for text in texts], device=self._device)
        lengths = torch.tensor(counts, device=self._device)[:, None]
        if min(counts) == longest:  # a lone text: what there is to be masked is nothing, and a mask takes its time
            states = self._model(input_ids=ids).last_hidden_state
            kept = states.float()
        else:
            mask = torch.arange(longest, device=self._device) < lengths
            states = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            kept = states.float() * mask[:, :, None]
        vectors = normalize(kept.sum(1) / lengths, dim=-1).cpu()
        rows = zip(vectors, states, texts, strict=True)
        return [EncodedText(vector, row[: len(text)].cpu()) for vector, row, text in rows]


def forwards(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Indices of the texts that run together, neighbours by length so that little of a forward is padding.

    Args:
        lengths: of the texts, in tokens.
        most: tokens of one forward, which are its rows times its longest; a longer text is alone.
    """
    found: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows, length = len(found[-1]) if found else 0, lengths[index]
        if rows and (rows + 1) * length <= most and rows * (length - longest) <= FORWARD_TOKENS:
            found[-1].append(index)
        else:
            found.append([index])
        longest = length
    return found


@dataclass(frozen=True)
class Place:
    """Where ``from_pretrained`` finds a T5: the subfolders are empty where the model itself is one."""

    model: str
    encoder: str = ""
    tokenizer: str = ""


def find(model: str) -> Place:
    """A T5 encoder by its own name, or by that of a pipeline that has one, in diffusers' layout.

    Of ``s3://`` only what is needed is downloaded. Raises TextEncoderError for a pipeline without a T5.
    """
    try:
        index = weights.pipeline_index(model)
    except weights.HubUnreachable:
        index = None  # the hub's cache may still have a T5
    if index is None:
        return Place(weights.local(model))
    encoder = next(
        (name for name, one in index.items() if isinstance(one, list) and len(one) == 2 and one[1] in T5_CLASSES), None
    )
    if encoder is None:
        raise TextEncoderError(f"the pipeline {model!r} has no T5 encoder")
    tokenizer = encoder.replace("text_encoder", "tokenizer")
    return Place(weights.local(model, lambda path: path.split("/")[0] in (encoder, tokenizer)), encoder, tokenizer)
