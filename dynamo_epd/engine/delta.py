# SPDX-License-Identifier: Apache-2.0
"""What an engine streams: the tokens of one step of one request, as a message that may cross processes."""

from __future__ import annotations

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
