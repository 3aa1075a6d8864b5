# SPDX-License-Identifier: Apache-2.0
"""T5's encoder, by transformers: pooled vectors for comparing texts, states of every token for conditioning."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer
from transformers.activations import NewGELUActivation

from dynamo_epd import weights
from dynamo_epd.errors import InvalidRequest
from dynamo_epd.sdk.config import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


T5_CLASSES = frozenset({"T5EncoderModel", "UMT5EncoderModel"})
T5_TYPES = frozenset({"t5", "umt5", "mt5"})

ROW_TOKENS = 48
"""Width of a row, where no text is longer. Wider rows are filled better, and attention takes more in them."""


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
        batch_tokens: in one forward; a longer text runs alone.

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
        self._padding: int = self._tokenizer.pad_token_id
        _fuse_activations(loaded)
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

        Texts lie one behind the other in rows, each attending to itself alone: so hardly a token is padding. T5 knows
        how far tokens are from each other, and not where in a row they are. As many forwards as ``batch_tokens`` wants:
        memory goes by rows times their width, in the position bias times the width once more.
        """
        found: dict[int, EncodedText] = {}
        for rows in forwards([len(ids) for ids in texts], self._batch_tokens):
            found |= self._forward(texts, rows)
        return [found[index] for index in range(len(texts))]

    def _forward(self, texts: Sequence[list[int]], rows: Sequence[Sequence[int]]) -> dict[int, EncodedText]:
        """By index; ``rows``: of indices."""
        if rows == [[rows[0][0]]]:  # what there is to be masked is nothing, and a mask takes its time
            alone = torch.tensor([texts[rows[0][0]]], device=self._device)
            states = self._model(input_ids=alone).last_hidden_state[0]
            vector = normalize(states.float().mean(0), dim=-1)
            return {rows[0][0]: EncodedText(vector.cpu(), states.cpu())}
        width = max(sum(len(texts[index]) for index in row) for row in rows)
        count = sum(map(len, rows))
        ids: list[int] = []
        whose: list[int] = []
        begins: dict[int, int] = {}
        for row in rows:
            for index in row:
                whose += [len(begins)] * len(texts[index])
                begins[index] = len(ids)
                ids += texts[index]
            padding = -len(ids) % width
            whose += [count] * padding  # it attends to itself: of what attends to nothing there are no numbers
            ids += [self._padding] * padding
        owners = torch.tensor(whose, device=self._device)
        of = owners.view(len(rows), width)
        states = self._model(
            input_ids=torch.tensor(ids, device=self._device).view(len(rows), width),
            attention_mask=(of[:, :, None] == of[:, None, :])[:, None],
        ).last_hidden_state.flatten(0, 1)
        sums = states.new_zeros((count + 1, states.shape[1]), dtype=torch.float32)
        sums.index_add_(0, owners, states.float())
        lengths = torch.tensor([len(texts[index]) for index in begins], device=self._device)
        vectors, states = normalize(sums[:-1] / lengths[:, None], dim=-1).cpu(), states.cpu()
        return {
            index: EncodedText(vector, states[begin : begin + len(texts[index])])
            for vector, (index, begin) in zip(vectors, begins.items(), strict=True)
        }


def _fuse_activations(model: torch.nn.Module) -> None:
    """GELU by its tanh formula in one kernel: transformers' is eight, which take a fifth of a batch's time."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def forwards(lengths: Sequence[int], most: int) -> list[list[list[int]]]:
    """Rows of the indices of texts that lie one behind the other, for each forward.

    Args:
        lengths: of the texts, in tokens.
        most: tokens of one forward; a longer text is alone in its row, and that in its forward.
    """
    in_order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    alone = [index for index in in_order if lengths[index] > most]
    others = in_order[len(alone) :]
    width = min(most, max([ROW_TOKENS, *(lengths[index] for index in others[:1])]))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """What is left in a row, and which it is, in order: the first that is wide enough is filled best."""
    for index in others:
        at = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(at) if at < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    at_once = max(1, most // width)
    return [[[index]] for index in alone] + [rows[first : first + at_once] for first in range(0, len(rows), at_once)]


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
