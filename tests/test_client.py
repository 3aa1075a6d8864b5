# SPDX-License-Identifier: Apache-2.0
"""Choosing an instance, where no process is needed to see it. The calls themselves: test_worker.py."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_epd.errors import StageUnavailable, WorkerLost
from dynamo_epd.sdk import client as client_module
from dynamo_epd.sdk.client import EndpointClient, ServiceClient
from tests.toys.relay import Back, Front

KNOWN = [3, 11, 29, 47]


def client() -> ServiceClient:
    return ServiceClient("Back", ("dynamo", "Back"), Back)


def test_a_lost_instance_moves_only_its_own_keys() -> None:
    one = client()
    one.route("affinity")
    keys = [f"image-{number}" for number in range(400)]
    before = {key: one._choose(KNOWN, None, key, ()) for key in keys}
    after = {key: one._choose(KNOWN[:-1], None, key, ()) for key in keys}
    assert set(before.values()) == set(KNOWN)
    assert all(after[key] == before[key] for key in keys if before[key] != KNOWN[-1])


def test_without_a_key_affinity_takes_turns() -> None:
    one = client()
    one.route("affinity")
    assert sorted(one._choose(KNOWN, None, None, ()) for _ in KNOWN) == KNOWN


def test_by_kv_a_prompt_goes_where_its_beginning_was_sent() -> None:
    one = client()
    one.route("kv")
    talks = {number: [b"%d.%d" % (number, block) for block in range(6)] for number in range(8)}
    first = {}
    for number, blocks in talks.items():
        first[number] = one._choose(KNOWN, None, None, (), blocks[:4])
        one._begin(first[number], blocks[:4])
        one._end(first[number], lost=False, answered=True, blocks=4)
    assert sorted(first.values()) == sorted(KNOWN * 2), "prompts that nobody has are spread"
    assert {number: one._choose(KNOWN, None, None, (), blocks) for number, blocks in talks.items()} == first
    assert one._choose([3, 11], None, None, (), talks[0]) in (3, 11)


def test_by_kv_a_worker_is_passed_over_that_has_more_to_do_than_it_would_save() -> None:
    one = client()
    one.route("kv")
    talk, other = [b"a", b"b", b"c"], [b"x", b"y", b"z"]
    home = one._choose(KNOWN, None, None, (), talk)
    one._begin(home, talk)
    assert one._choose(KNOWN, None, None, (), [*talk, b"d"]) == home, "as much in flight as is saved: it is at home"
    one._begin(home, other)
    assert one._choose(KNOWN, None, None, (), [*talk, b"d"]) != home
    assert one._choose(KNOWN, None, None, (), ()) != home
    one._end(home, lost=False, answered=True, blocks=3)
    one._end(home, lost=False, answered=True, blocks=3)
    assert one._choose(KNOWN, None, None, (), [*talk, b"d"]) == home
    assert not one._in_flight and not one._blocks_in_flight


def test_suspects_are_passed_over_unless_nobody_else_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    one = client()
    one._begin(11)
    one._end(11, lost=True, answered=False)
    assert 11 not in {one._choose(KNOWN, None, None, ()) for _ in range(8)}
    assert one._choose([11], None, None, ()) == 11
    monkeypatch.setattr(client_module.time, "monotonic", lambda: 1e12)
    assert 11 in {one._choose(KNOWN, None, None, ()) for _ in range(8)}


def test_who_is_named_must_be_there() -> None:
    with pytest.raises(WorkerLost, match="Back"):
        client()._choose(KNOWN, 5, None, ())
    with pytest.raises(StageUnavailable, match="no Back is running"):
        client()._choose([], None, None, ())


def test_an_unknown_policy_or_endpoint_is_named() -> None:
    with pytest.raises(ValueError, match="'fastest' is none of round-robin"):
        client().route("fastest")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="Back has no endpoint 'anwser'; it has again, answer"):
        _ = client().anwser


def test_outside_a_graph_a_dependency_is_falsy_and_unavailable() -> None:
    back = Front().back
    assert not back
    assert back.instances() == []
    with pytest.raises(StageUnavailable, match="not linked"):
        back.answer({})
    with pytest.raises(StageUnavailable):
        asyncio.run(back.ready(0.01))


class Place:
    """A double: the runtime's endpoint. Counts the watches of discovery; ``live`` are its instances."""

    def __init__(self, live: list[int]):
        self.live = live
        self.watches = 0

    async def client(self) -> Place:
        self.watches += 1
        return self

    async def wait_for_instances(self) -> None:
        pass

    def instance_ids(self) -> list[int]:
        return self.live


def test_instances_are_counted_by_what_takes_from_anybody() -> None:
    """One that drains can still be asked by those whom it served, and counts as live no more."""

    async def main() -> None:
        one, again, answer = client(), Place(KNOWN), Place(KNOWN[1:])
        one.endpoints["again"].place, one.endpoints["answer"].place = again, answer
        await one.connect()
        assert one.instances() == KNOWN[1:]
        assert (again.watches, answer.watches) == (0, 1)
        answer.live = []
        assert one.instances() == []
        await one.endpoints["again"].connect()
        assert one.endpoints["again"].known() == KNOWN
        assert (again.watches, answer.watches) == (1, 1)

    asyncio.run(main())


def test_a_client_for_addressed_endpoints_alone_counts_by_those() -> None:
    one = ServiceClient("Back", ("dynamo", "Back"), None)
    card = one.endpoints["card"] = EndpointClient(one, "card", bytes, addressed=True)
    card.place = Place(KNOWN)
    asyncio.run(one.connect())
    assert one.instances() == KNOWN


class RemoteWhoseWorkersDie:
    """A double: the runtime's client, each of whose workers dies with what it takes, before it has said a word."""

    def __init__(self) -> None:
        self.died: list[int] = []

    def instance_ids(self) -> list[int]:
        return KNOWN

    async def direct(self, payload: bytes, instance: int, **_: object) -> None:
        self.died.append(instance)
        raise Exception("disconnected")


def test_a_call_that_ends_who_takes_it_does_not_end_all() -> None:
    one = client()
    one._met.update(KNOWN)  # one that was never met is asked twice: it may only just have come
    remote = one.endpoints["answer"].remote = RemoteWhoseWorkersDie()
    with pytest.raises(WorkerLost):
        asyncio.run(one.endpoints["answer"]({"number": 1}).only())
    assert len(set(remote.died)) == len(remote.died) == 3 < len(KNOWN)


class RemoteThatSaysNothing(RemoteWhoseWorkersDie):
    """A double: what is sent to it is never taken. ``gone``: because it is dead, and was taken out of discovery."""

    def __init__(self, *, gone: bool):
        super().__init__()
        self.gone = gone

    def instance_ids(self) -> list[int]:
        return [one for one in KNOWN if not (self.gone and one in self.died)]

    async def direct(self, payload: bytes, instance: int, **_: object) -> None:
        self.died.append(instance)
        await asyncio.sleep(60)


@pytest.mark.parametrize("gone", [True, False])
def test_who_dies_with_a_request_on_its_way_is_waited_for_until_discovery_says_so(
    gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "GONE_SECONDS", 0.02)
    one = client()
    one._met.update(KNOWN)
    remote = one.endpoints["answer"].remote = RemoteThatSaysNothing(gone=gone)
    with pytest.raises(WorkerLost if gone else TimeoutError):
        asyncio.run(asyncio.wait_for(one.endpoints["answer"]({"number": 1}).only(), 0.5))
    assert len(remote.died) == (3 if gone else 1)
