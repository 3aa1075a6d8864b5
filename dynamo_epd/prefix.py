# SPDX-License-Identifier: Apache-2.0
"""Which worker has the beginning of a prompt in its KV cache: what routing by ``kv`` goes by.

An estimate from what this process itself has sent where, as Dynamo's router makes one where workers publish no KV
events. Where a worker has evicted what is believed of it, a prompt is prefilled that somebody had to prefill.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence

BLOCK = 64
"""Tokens that are told apart. Engines cache blocks of 16 to 128."""
MOST_BLOCKS = 1 << 15
"""Remembered of one worker: two million tokens, in some 5 MB."""


def blocks_of(
    token_ids: Sequence[int], images: Sequence[tuple[str, int]], placeholders: Iterable[int], salt: str | None
) -> list[bytes]:
    """A hash for each whole block of a prompt, which is also one of all that precedes it.

    Args:
        token_ids: of the prompt, one placeholder an image.
        images: identity and number of tokens of each, in prompt order.
        placeholders: the tokens that may stand for an image. It is the one that occurs once an image; without one,
            prompts only share a beginning where they have the same images.
        salt: prompts with different ones share nothing.
    """
    digest = hashlib.blake2b((salt or "").encode(), digest_size=8).digest()
    place = next((token for token in placeholders if images and token_ids.count(token) == len(images)), None)
    row = array("I")
    if place is None:
        digest = hashlib.blake2b("\0".join(uuid for uuid, _ in images).encode(), key=digest, digest_size=8).digest()
        row.extend(token_ids)
    else:
        begin = 0
        for uuid, tokens in images:
            end = token_ids.index(place, begin)
            row.extend(token_ids[begin:end])
            identity = array("I", hashlib.blake2b(uuid.encode()).digest())
            row.extend((identity * (tokens // len(identity) + 1))[:tokens])
            begin = end + 1
        row.extend(token_ids[begin:])
    blocks = []
    for begin in range(0, len(row) - BLOCK + 1, BLOCK):
        digest = hashlib.blake2b(row[begin : begin + BLOCK].tobytes(), key=digest, digest_size=8).digest()
        blocks.append(digest)
    return blocks


class Seen:
    """The blocks that each worker was sent last."""

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._most = most
        self._of: dict[int, OrderedDict[bytes, None]] = {}

    def overlap(self, worker: int, blocks: Sequence[bytes]) -> int:
        """How many of the first ``blocks`` ``worker`` has."""
        known = self._of.get(worker, OrderedDict[bytes, None]())
        return next((count for count, block in enumerate(blocks) if block not in known), len(blocks))

    def note(self, worker: int, blocks: Sequence[bytes]) -> None:
        """``worker`` was sent a prompt of ``blocks``."""
        known = self._of.setdefault(worker, OrderedDict())
        for block in reversed(blocks):  # as engines evict: the end of a prompt before its beginning
            known[block] = None
            known.move_to_end(block)
        while len(known) > self._most:
            known.popitem(last=False)

    def keep(self, workers: Collection[int]) -> None:
        """Forgets everyone else."""
        for gone in self._of.keys() - set(workers):
            del self._of[gone]
