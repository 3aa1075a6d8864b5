# SPDX-License-Identifier: Apache-2.0
"""First fit with coalescing over one range of bytes. Knows offsets only, never memory."""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT = 256
"""Bytes. Holds every dtype, and keeps two slots out of one cache line."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a whole number of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Allocator:
    """Blocks of ``[start, end)``, each a multiple of `ALIGNMENT`. A block of no bytes takes no room."""

    def __init__(self, start: int, end: int):
        self._start = start
        self.capacity = end - start
        self.used = 0
        self._blocks: dict[int, int] = {}
        self._free = [(start, self.capacity)]  # (offset, size), sorted, never adjacent to one another

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a new block, or None if no gap is large enough."""
        size = aligned(nbytes)
        if size == 0:
            return self._start
        for index, (offset, gap) in enumerate(self._free):
            if gap >= size:
                if gap == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, gap - size)
                self._blocks[offset] = size
                self.used += size
                return offset
        return None

    def allocate_all(self, sizes: list[int]) -> list[int] | None:
        """An offset for each size, or None and nothing taken."""
        offsets: list[int] = []
        for size in sizes:
            offset = self.allocate(size)
            if offset is None:
                for taken, taken_size in zip(offsets, sizes, strict=False):
                    self.free(taken, taken_size)
                return None
            offsets.append(offset)
        return offsets

    def free(self, offset: int, nbytes: int) -> None:
        """Give a block back, with the size that it was asked for."""
        if nbytes == 0:
            return
        size = self._blocks.pop(offset)
        assert size == aligned(nbytes), "a block is freed with its own size"
        self.used -= size
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and offset + size == self._free[index][0]:
            size += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            before, gap = self._free.pop(index - 1)
            offset, size = before, gap + size
        insort(self._free, (offset, size))

    def copy(self) -> Allocator:
        """A second allocator in the same state, to try things on."""
        twin = Allocator(self._start, self._start + self.capacity)
        twin.used, twin._blocks, twin._free = self.used, dict(self._blocks), list(self._free)
        return twin
