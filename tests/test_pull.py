# SPDX-License-Identifier: Apache-2.0
"""The pieces of one READ, over a double of NIXL whose bytes take their time. The real one is in test_transfer.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_epd.errors import DigestMismatch
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.memory import digest_of
from dynamo_epd.transfer.pull import PIECE_BYTES, PIECES_IN_FLIGHT, Pull
from tests.serving import eventually


class ReadDouble:
    def __init__(self) -> None:
        self.posted = self.here = False

    def poll(self) -> bool:
        self.posted = True
        return self.here


class AgentDouble:
    def __init__(self) -> None:
        self.reads: list[ReadDouble] = []

    def read(self, peer: str, local: int, remote: int, nbytes: int) -> ReadDouble:
        self.reads.append(ReadDouble())
        return self.reads[-1]


def pull_of(agent: Any, data: bytes, promised: bytes | None = None) -> Pull:
    digest = digest_of(data if promised is None else promised)
    handle = Handle("o", "i", "lease", 0, len(data), (len(data),), "bytes", digest, 0.0, True)
    memory: Any = SimpleNamespace(address=0, bytes_at=lambda offset, nbytes: data[offset : offset + nbytes])
    peer: Any = SimpleNamespace(incarnation="i", address=0, in_flight=0)
    peers: Any = SimpleNamespace(finished=lambda _: None, drop=lambda _: None)
    return Pull(agent, peers, peer, handle, memory, 0)


def test_pieces_are_on_their_way_side_by_side_and_taken_in_order() -> None:
    agent = AgentDouble()
    pull = pull_of(agent, bytes(5 * PIECE_BYTES + 3))
    for _ in range(10):
        assert not pull.step()
    assert [read.posted for read in agent.reads] == [True] * PIECES_IN_FLIGHT
    agent.reads[1].here = True
    assert not pull.step()
    assert len(agent.reads) == PIECES_IN_FLIGHT, "they are taken in order"
    agent.reads[0].here = True
    for _ in range(10):
        assert not pull.step()
    assert (len(agent.reads), pull.taken) == (6, 2 * PIECE_BYTES)
    for read in agent.reads:
        read.here = True
    eventually(pull.step, "its end")
    assert pull.step(), "and stays so"


@pytest.mark.parametrize("wrong", [0, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES - 1])
def test_a_wrong_byte_of_any_piece_is_found(wrong: int) -> None:
    agent = AgentDouble()
    data = bytearray(3 * PIECE_BYTES)
    promised = bytes(data)
    data[wrong] = 1
    pull = pull_of(agent, bytes(data), promised)

    def ended() -> bool:
        done = pull.step()
        for read in agent.reads:
            read.here = True
        return done

    with pytest.raises(DigestMismatch):
        eventually(ended, "its end")
    assert pull.ended_lease == "lease"
    assert not pull.done
