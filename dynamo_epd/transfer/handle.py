# SPDX-License-Identifier: Apache-2.0
"""The small thing that travels in place of the bytes."""

from __future__ import annotations

import math

import msgspec

from dynamo_epd.errors import HandOffFailed

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bytes": 1}
"""Bytes of one item, for every dtype that may travel. ``bytes`` is one dimension of raw bytes, read as a memoryview."""

MAX_DIMENSIONS = 8
DIGEST_CHARACTERS = 32


def nbytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes that ``shape`` of ``dtype`` takes. Raises `HandOffFailed` for what cannot be a tensor of ours."""
    if dtype not in ITEM_BYTES:
        raise HandOffFailed(f"dtype {dtype[:40]!r} does not travel")
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape) or (dtype == "bytes" and len(shape) != 1):
        raise HandOffFailed(f"not a shape of {dtype}")
    return math.prod(shape) * ITEM_BYTES[dtype]


class Handle(msgspec.Struct, frozen=True):
    """Where bytes lie, whose they are, how to know them again and until when. Crosses processes as JSON."""

    owner: str
    """How the owner is reached on the control plane: opaque here, given to `Arena.open`."""
    incarnation: str
    """NIXL agent name, unique to one life of one process."""
    lease: str
    """Id of this lease; the reader's NIXL notification carries it back."""
    offset: int
    """Bytes from the start of the owner's arena."""
    length: int
    """Bytes."""
    shape: tuple[int, ...]
    dtype: str
    digest: str
    """XXH3-128, 32 hex characters: see `memory.digest_of` for what it guards against."""
    lease_end: float
    """Unix seconds by the owner's clock. One that has to be renewed may end before: see `Arena.lease`."""
    ends_on_read: bool
    """True: the READ's completion notice ends the lease. False: it lives until released or expired."""

    def check(self) -> None:
        """Raise `HandOffFailed` unless the handle agrees with itself. `check_within` knows its owner's bounds."""
        if not (self.length >= 0 <= self.offset and nbytes_of(self.shape, self.dtype) == self.length):
            raise HandOffFailed("the handle's shape, dtype and length disagree")
        if len(self.digest) != DIGEST_CHARACTERS:
            raise HandOffFailed("the handle's digest is malformed")
        if not (0 < len(self.lease) <= 64 and 0 < len(self.incarnation) <= 256):
            raise HandOffFailed("the handle's lease or incarnation is malformed")
        if not math.isfinite(self.lease_end):
            raise HandOffFailed("the handle's lease has no end")

    def check_within(self, nbytes: int) -> None:
        """Raise `HandOffFailed` if the handle points outside its owner's arena of ``nbytes``."""
        if self.offset + self.length > nbytes:
            raise HandOffFailed("the handle points outside its owner's arena")
