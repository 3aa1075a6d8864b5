# SPDX-License-Identifier: Apache-2.0
"""What an engine streams, the tokens of one step of one request, and what a grammar must know: as messages."""

from __future__ import annotations

from typing import Any

import msgspec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position: the sampled token first, then the most likely ones, most likely first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the sampled token in the vocabulary; 1 is the most likely."""


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens since the delta before. The last one of a request carries ``finish_reason``."""

    token_ids: list[int]
    finish_reason: str | None = None
    """``stop`` (an end or stop token, which is then the last of ``token_ids``) or ``length``."""
    stop_reason: int | None = None
    """The stop token, where it was one of the request's own ``stop_token_ids``."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_tokens: int | None = None
    """Length of the prompt with its image tokens; on the first delta only."""
    queue_seconds: float | None = None
    """How long the request waited in the engine; on the first delta only."""


class Reasoning(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an answer that must keep to a grammar is first reasoned about, and the grammar holds only then."""

    ended: bool = False
    """Whether the prompt ends that already."""
    template: dict[str, Any] = {}
    """What the chat template was given: parsers of some models depend on it."""
