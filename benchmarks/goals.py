# SPDX-License-Identifier: Apache-2.0
"""The goals in the words in which they were set, before there was a row: a report shows them beside what it judges."""

from __future__ import annotations

from collections.abc import Mapping

WORDS: Mapping[int, str] = {
    1: "whole answer, one client: OURS-agg ≤ 1.0x AGG; OURS-disagg ≤ 1.2x AGG and ≥ 3.5x faster than STOCK; an idle "
    "graph takes < 10 % of one core",
    2: "what the graph adds to an engine call (echo engine): ≤ 2 ms p50, ≤ 5 ms p99",
    3: "embedding hand-off, digest checked: ≤ 0.3 ms to 64 KiB (≥ 30x `dynamo.nixl_connect`); ≤ 1.3x NIXL itself from "
    "4 MiB; from handle in hand to verified tensor, control message excluded; 16 at once ≤ 2x the fair share; first "
    "one at start-up",
    4: "encoder images/s, 16 waiting: CLIP B/32 and L/14-336 sizes both shown: ≥ 2x STOCK where overhead rules, never "
    "below 0.97x of unbatched where arithmetic does; N equal images at once are one encode",
    5: "time to first token, image seen before: ≤ 1.10x of a text prompt of the same length, from any worker; another "
    "question, prefix cache cold in both",
    6: "a running text stream during an image storm: p99 inter-token latency ≤ 1.10x of its value without images (AGG "
    "shown beside)",
    7: "goodput (TTFT and ITL limits), 4 images a request: ≥ 2.0x AGG, ≥ 1.3x STOCK; raw throughput ≥ 0.95x AGG",
    8: "time to first token, 4 images: encode overlapped with prefill ≤ 0.70x of the same graph with a barrier",
    9: "prefill → decode KV: TTFT ≤ 1.15x AGG unloaded (push, dispatched together)",
    10: "T5, 64 short texts at once: ≥ 6x one-request-per-forward; one text ≤ 1.05x a direct call",
    11: "images, 8 at once on the tiny model: ≥ 2.5x one after another; a late one waits at most one step; same pixels "
    "per seed within tolerance",
    12: "from `dynamo serve` to the first answer, tiny disagg graph: ≤ 1.2x of a single `vllm serve`",
    13: "weights of an encode worker: vision tower and projector only: ≤ 1.1x their parameter bytes",
    14: "copies of T5-XXL in a graph with N image workers: 1, not N+1: each image worker is smaller by the whole text "
    "encoder",
}
"""Row → what was asked for, and of what."""
