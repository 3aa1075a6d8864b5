# SPDX-License-Identifier: Apache-2.0
"""A T5 that is elsewhere: it stands in a pipeline where the pipeline's own T5 would, and holds no weight."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Row:
    """One text as a pipeline has tokenized it.

    ids: with padding up to the pipeline's length.
    real: how many of them are no padding.
    masked: whether attention leaves the padding out (PixArt), or the pipeline means it to be seen (FLUX, SD3).
    """

    ids: tuple[int, ...]
    real: int
    masked: bool


@dataclass(frozen=True)
class Conditioning:
    """A row's answer.

    states: (tokens, width): of the real tokens where the row is masked, else of all.
    vector: pooled over the real tokens, of length 1; little-endian float32.
    """

    states: torch.Tensor
    vector: bytes


Ask = Callable[[Row], Conditioning]
"""It blocks."""


class RemoteTextEncoder(nn.Module):
    """Answers as transformers' ``T5EncoderModel`` does where diffusers' pipelines call it.

    Rows asked for lately are kept, up to ``kept`` of them: the empty prompt of guidance is the same in every request.
    """

    def __init__(self, ask: Ask, dtype: torch.dtype, device: torch.device, *, kept: int = 16):
        super().__init__()
        self.dtype = dtype
        self.device = device
        self.nothing = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        """CPU offload asks the first parameter of a module where the module is."""
        self._ask = ask
        self._most = kept
        self._kept: OrderedDict[Row, Conditioning] = OrderedDict()
        self._heard: ContextVar[bytes | None] = ContextVar("heard", default=None)

    @property
    def vector(self) -> bytes | None:
        """Of the first row in this context, which is a picture's own: pipelines encode the prompt before what guides
        away from it."""
        return self._heard.get()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> tuple[torch.Tensor]:
        """input_ids, attention_mask: int64 (rows, length). Returns states (rows, length, width), 0 where masked out."""
        masks = attention_mask if attention_mask is not None else [None] * len(input_ids)
        rows = [_row(ids, mask) for ids, mask in zip(input_ids, masks, strict=True)]
        found = [self._conditioning(row) for row in rows]
        self._heard.set(self._heard.get() or found[0].vector)
        states = [one.states for one in found]
        padded = states[0].new_zeros((len(rows), input_ids.shape[1], states[0].shape[-1]))
        for into, one in zip(padded, states, strict=True):
            into[: len(one)] = one
        return (padded.to(device=self.device, dtype=self.dtype),)

    def _conditioning(self, row: Row) -> Conditioning:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        found = self._ask(row)
        self._kept[row] = found
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return found


END_OF_TEXT = 1
"""T5's end mark; padding follows it."""


def _row(ids: torch.Tensor, mask: torch.Tensor | None) -> Row:
    listed = tuple(ids.tolist())
    if mask is not None:
        return Row(listed, int(mask.sum()), masked=True)
    real = listed.index(END_OF_TEXT) + 1 if END_OF_TEXT in listed else len(listed)
    return Row(listed, real, masked=False)
