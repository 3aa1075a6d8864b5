# SPDX-License-Identifier: Apache-2.0
"""What the garbage collector is spared."""

from __future__ import annotations

import gc

from dynamo_epd import heap


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_alive_is_not_walked_again_and_what_is_not_is_freed_before() -> None:
    alive, dead = Cycle(), Cycle()
    del dead
    try:
        heap.keep()
        assert gc.get_freeze_count() > 0
        assert not any(one is alive for one in gc.get_objects())
        gc.unfreeze()
        assert [one for one in gc.get_objects() if type(one) is Cycle] == [alive]
    finally:
        gc.unfreeze()
