# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

from dynamo_epd.transfer.allocator import ALIGNMENT, Allocator, aligned


def check(allocator: Allocator, held: dict[int, int]) -> None:
    """No overlap, nothing outside, nothing lost, every gap as long as it can be."""
    spans = sorted([(offset, aligned(size), "held") for offset, size in held.items()])
    gaps = [(offset, size, "gap") for offset, size in allocator._free]
    position, before = ALIGNMENT, "held"
    for offset, size, kind in sorted(spans + gaps):
        assert offset == position
        assert offset % ALIGNMENT == 0
        assert size > 0
        assert not (kind == before == "gap"), "two gaps side by side"
        position, before = offset + size, kind
    assert position == ALIGNMENT + allocator.capacity
    assert allocator.used == sum(size for _, size, _ in spans)


def test_random_operations_keep_the_books() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        allocator = Allocator(ALIGNMENT, ALIGNMENT * 65)
        held: dict[int, int] = {}
        for _ in range(400):
            if held and rng.random() < 0.45:
                offset = rng.choice(list(held))
                allocator.free(offset, held.pop(offset))
            else:
                sizes = [rng.randint(1, ALIGNMENT * 12) for _ in range(rng.randint(1, 3))]
                largest_gap = max((size for _, size in allocator._free), default=0)
                offsets = allocator.allocate_all(sizes)
                if offsets is not None:
                    held |= dict(zip(offsets, sizes, strict=True))
                elif len(sizes) == 1:
                    assert aligned(sizes[0]) > largest_gap, "refused what fits"
            check(allocator, held)
        for offset, size in held.items():
            allocator.free(offset, size)
        check(allocator, {})
        assert allocator.allocate(allocator.capacity) == ALIGNMENT, "all of it is one gap again"


def test_no_bytes_take_no_room() -> None:
    allocator = Allocator(ALIGNMENT, ALIGNMENT * 2)
    assert allocator.allocate_all([0, ALIGNMENT, 0]) == [ALIGNMENT] * 3
    assert allocator.allocate(1) is None
    allocator.free(ALIGNMENT, 0)
    assert allocator.used == ALIGNMENT


def test_a_copy_is_independent() -> None:
    allocator = Allocator(ALIGNMENT, ALIGNMENT * 4)
    offset = allocator.allocate(ALIGNMENT)
    assert offset is not None
    twin = allocator.copy()
    twin.free(offset, ALIGNMENT)
    assert (twin.used, allocator.used) == (0, ALIGNMENT)
