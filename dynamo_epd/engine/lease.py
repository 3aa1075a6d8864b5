# SPDX-License-Identifier: Apache-2.0
"""For how long a KV cache may be pulled. After that its prefill engine fills the blocks for another prompt; who pulls
them then gets the other one's, keeps them in its prefix cache, and nothing in the bytes says so.

    prefill ends ── TAKE_OVER ──→ a decode worker has it ── STILL ──→ its engine has it ── STILL ──→ that turns
    └────────────────────────────────── less than KV_LEASE ──────────────────────────────────────────────────┘

From there on vLLM's heartbeats hold the lease: each sixth of it they extend what is left to two thirds of it, so for an
engine that has turned `STILL_SECONDS` are not too many either.
"""

from __future__ import annotations

KV_LEASE_SECONDS = 10
"""How long prefill keeps blocks that nobody came for. vLLM's default is 30 s, in which the blocks of
decode workers that were killed fill a busy cache."""

TAKE_OVER_SECONDS = 2.0
"""In which a decode worker must have begun. No more than DYN_NATS_REQUEST_TIMEOUT_SECS: one that stood still for
longer must do nothing, since another was asked and may be pulling. Told by the clocks of two machines."""

STILL_SECONDS = 3.0
"""A decode worker or its engine that stood still for longer, with a KV cache that it had yet to pull, gives it up."""

PULLED = "pulled"
"""Under which a decode engine's scheduler says of a traced request's KV cache when it was pulled: [began, ended (Unix
seconds), whether it came]."""
