# SPDX-License-Identifier: Apache-2.0
"""What prompts share, and who is believed to have it. Routing by it: test_client.py, acceptance/test_routing.py."""

from __future__ import annotations

from dynamo_epd.prefix import BLOCK, Seen, blocks_of

IMAGE, START = 9, 8
TEXT = list(range(100, 100 + 3 * BLOCK))


def shared(one: list[bytes], other: list[bytes]) -> int:
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def test_only_whole_blocks_count() -> None:
    assert blocks_of(TEXT[: BLOCK - 1], [], (), None) == []
    assert len(blocks_of(TEXT[: 2 * BLOCK + 5], [], (), None)) == 2


def test_a_conversation_goes_on_from_what_it_was() -> None:
    first = blocks_of(TEXT, [], (), None)
    second = blocks_of([*TEXT, *TEXT], [], (), None)
    assert second[:3] == first
    assert len(set(second)) == 6, "a block is one of all that precedes it"
    other = blocks_of([*TEXT[:BLOCK], 1, *TEXT[BLOCK + 1 :]], [], (), None)
    assert shared(first, other) == 1


def test_prompts_of_two_tenants_share_nothing() -> None:
    assert shared(blocks_of(TEXT, [], (), "a"), blocks_of(TEXT, [], (), "b")) == 0


def test_an_image_counts_as_its_tokens_from_its_place_on() -> None:
    prompt = [*TEXT[:BLOCK], START, IMAGE, *TEXT]
    one = blocks_of(prompt, [("cat", 100)], (START, IMAGE), None)
    assert len(one) == (4 * BLOCK + 1 + 100) // BLOCK
    assert shared(one, blocks_of(prompt, [("dog", 100)], (START, IMAGE), None)) == 1
    assert one == blocks_of(prompt, [("cat", 100)], (START, IMAGE), None)


def test_a_second_picture_later_in_a_conversation_leaves_its_beginning() -> None:
    first = blocks_of([IMAGE, *TEXT], [("cat", BLOCK)], (IMAGE,), None)
    second = blocks_of([IMAGE, *TEXT, IMAGE, *TEXT], [("cat", BLOCK), ("dog", BLOCK)], (IMAGE,), None)
    assert second[:4] == first
    swapped = blocks_of([IMAGE, *TEXT, IMAGE, *TEXT], [("dog", BLOCK), ("cat", BLOCK)], (IMAGE,), None)
    assert shared(second, swapped) == 0


def test_where_no_token_stands_for_one_image_each_the_same_images_are_needed() -> None:
    def prompt(*images: str) -> list[bytes]:
        return blocks_of(TEXT, [(uuid, 10) for uuid in images], (IMAGE,), None)

    assert prompt("cat") == prompt("cat")
    assert shared(prompt("cat"), prompt("dog")) == shared(prompt("cat"), prompt("cat", "dog")) == 0


def test_of_what_is_remembered_the_ends_of_old_prompts_go_first() -> None:
    seen = Seen(most=5)
    old, new = blocks_of(TEXT, [], (), "old"), blocks_of(TEXT, [], (), "new")
    seen.note(1, old)
    assert (seen.overlap(1, old), seen.overlap(2, old)) == (3, 0)
    seen.note(1, new)
    assert (seen.overlap(1, old), seen.overlap(1, new)) == (2, 3)
    seen.keep([2])
    assert seen.overlap(1, new) == 0
