# SPDX-License-Identifier: Apache-2.0
"""Calls between real processes over the real runtime and NATS: types, errors, cancellation, loss, routing, bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_epd.failures import Hung
from dynamo_epd.sdk import wire, worker
from dynamo_epd.sdk.config import Document, resolve
from dynamo_epd.sdk.context import dynamo_context
from dynamo_epd.sdk.graph import load_graph
from tests.toys.running import Served

GRAPH = "tests/toys/relay.py:Front"


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Polls; the bound only keeps a failing test from hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("relay") / "events"


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, events: Path) -> Iterator[Served]:
    arguments = (GRAPH, f"--Back.events={events}", "--Back.ServiceArgs.workers=3")
    with Served(tmp_path_factory.mktemp("state"), *arguments) as served:
        yield served.wait_until_up()


def test_replies_are_typed_over_two_hops(relay: Served) -> None:
    result = relay.call({"number": 4}, service="middle", endpoint="relay")["results"][0]
    assert result["ticks"] == [0, 1, 2, 3]
    assert "error" not in result


def test_a_refusal_keeps_its_class_param_and_code(relay: Served) -> None:
    result = relay.call({"mode": "refuse", "number": 2}, service="middle", endpoint="relay")["results"][0]
    assert result["ticks"] == [0, 1]
    assert result["error"] == {
        "class": "InvalidRequest",
        "message": "not this one",
        "code": "no_thanks",
        "param": "mode",
    }


def test_a_defect_leaves_without_its_text(relay: Served) -> None:
    result = relay.call({"mode": "break", "number": 1})["results"][0]
    assert result["error"]["class"] == "InternalError"
    assert "secret" not in json.dumps(result)
    relay.wait_for("RuntimeError: secret of the inside")  # but the operator sees it


def test_a_request_of_another_shape_is_the_senders_fault(relay: Served) -> None:
    before = relay.workers("Back")
    results = relay.call({"number": "many"}, {"mode": 7}, {"number": 1})["results"]
    assert [one.get("error", {}).get("class") for one in results] == ["InvalidRequest", "InvalidRequest", None]
    assert relay.workers("Back") == before


def test_work_reaches_every_worker(relay: Served) -> None:
    results = relay.call(*[{"number": 1}] * 9)["results"]
    assert sorted(one["worker"] for one in results) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(one["from"] == one["instance"] for one in results)


def test_affinity_keeps_a_key_where_it_was(relay: Served) -> None:
    chosen = [
        {one["worker"] for one in relay.call(*[{"number": 1}] * 4, policy="affinity", key=f"k{n}")["results"]}
        for n in range(12)
    ]
    assert all(len(workers) == 1 for workers in chosen)
    assert len(set.union(*chosen)) > 1


def test_a_conversation_goes_on_where_its_beginning_is_cached(relay: Served) -> None:
    def asked(talk: str, turns: int) -> int:
        blocks = [f"{talk}{turn}" for turn in range(turns)]
        return int(relay.call({"number": 1}, policy="kv", blocks=blocks)["results"][0]["worker"])

    first = {talk: asked(talk, 2) for talk in "abcdef"}
    assert sorted(first.values()) == [0, 0, 1, 1, 2, 2]
    assert {talk: asked(talk, 5) for talk in "fedcba"} == first


def test_least_loaded_passes_over_the_busy(relay: Served) -> None:
    results = relay.call(*[{"number": 2, "pause": 0.5}] * 6, policy="least-loaded", at_once=True)["results"]
    assert sorted(one["worker"] for one in results) == [0, 0, 1, 1, 2, 2]


def test_a_named_instance_and_excluded_ones(relay: Served) -> None:
    instances = relay.call()["instances"]
    assert len(instances) == 3
    named = relay.call(*[{"number": 1}] * 3, instance=int(instances[1]))["results"]
    assert {one["instance"] for one in named} == {instances[1]}
    other = relay.call(*[{"number": 1}] * 4, exclude=[int(instances[0]), int(instances[2])])["results"]
    assert {one["instance"] for one in other} == {instances[1]}
    nobody = relay.call({"number": 1}, exclude=[int(one) for one in instances])["results"][0]
    assert nobody["error"]["class"] == "StageUnavailable"
    assert "Back" in nobody["error"]["message"]


def test_above_its_bound_a_worker_is_overloaded_at_once(relay: Served) -> None:
    instance = int(relay.call()["instances"][0])
    results = relay.call(*[{"mode": "hang", "number": 1}] * 10, at_once=True, instance=instance, patience=2)["results"]
    classes = sorted(one["error"]["class"] for one in results)
    assert classes == ["Overloaded"] * 2 + ["TimeoutError"] * 8
    eventually(lambda: "error" not in relay.call({"number": 1}, instance=instance)["results"][0], "room again")


@pytest.mark.parametrize(
    ("trace", "leave"), [("closed", {"take": 1}), ("cancelled", {"patience": 1}), ("silent", {"patience": 1})]
)
def test_leaving_closes_the_generator_two_hops_away(
    relay: Served, events: Path, trace: str, leave: dict[str, int]
) -> None:
    ask = {"mode": "hang", "number": 0 if trace == "silent" else 1, "trace": trace}
    relay.call(ask, service="middle", endpoint="relay", **leave)
    eventually(lambda: f"closed {trace}" in events.read_text(), "the far generator's finally", 10)


def test_a_worker_killed_mid_stream_is_lost_then_passed_over_then_back(relay: Served) -> None:
    before = relay.workers("Back")
    # The pause lets the frames out before the kill: one of which nothing came may be given to another, to its end too.
    lost = relay.call({"mode": "die", "number": 2, "pause": 0.5})["results"][0]
    assert lost["error"]["class"] == "WorkerLost"
    assert lost["ticks"] == [0, 1]
    after = relay.call(*[{"number": 1}] * 4)
    assert all("error" not in one for one in after["results"])
    assert lost["instance"] not in after["instances"]
    relay.wait_for(r"Back-\d died \(signal 9\)")
    relay.wait_for(r"Back-\d is back")
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances again")
    assert len(set(relay.workers("Back").values()) - set(before.values())) == 1


def test_a_worker_drains_on_sigterm(relay: Served, events: Path) -> None:
    """What runs on it ends whole; what comes meanwhile goes elsewhere; its hooks run in reverse order."""
    import threading

    events.write_text("")
    victim = relay.workers("Back")[0]
    outcome: list[dict[str, object]] = []
    asks = [{"number": 8, "pause": 0.2, "trace": "drained"}] * 6
    calling = threading.Thread(target=lambda: outcome.extend(relay.call(*asks, at_once=True)["results"]))
    calling.start()
    time.sleep(0.6)
    os.kill(victim, signal.SIGTERM)
    meanwhile = relay.call(*[{"number": 1}] * 12)["results"]
    calling.join()
    assert [one["ticks"] for one in outcome] == [list(range(8))] * 6
    assert [one["error"] for one in meanwhile if "error" in one] == []
    eventually(lambda: events.read_text().count("shutdown") == 2, "both hooks")
    lines = events.read_text().splitlines()
    assert lines.index("shutdown second") < lines.index("shutdown first")
    eventually(lambda: relay.workers("Back").get(0) not in (None, victim), "a new worker")


def test_a_worker_that_leaves_is_reached_by_those_whom_it_served(relay: Served, events: Path) -> None:
    """And by nobody else, until it owes nobody anything: a picture that it laid out may still be to be fetched."""
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    events.write_text("")
    served = relay.call({"number": 1})["results"][0]
    instance = int(served["instance"])
    assert relay.call({}, endpoint="again", instance=instance)["results"][0]["ticks"] == [0]
    running = {"number": 40, "pause": 0.1}
    calling = threading.Thread(target=lambda: relay.call(running, instance=instance))
    calling.start()
    time.sleep(0.5)
    os.kill(relay.workers("Back")[served["worker"]], signal.SIGTERM)
    eventually(lambda: str(instance) not in relay.call()["instances"], "it counts as live no more")
    assert calling.is_alive()
    assert relay.call({"number": 1}, instance=instance)["results"][0]["error"]["class"] == "WorkerLost"
    assert relay.call({}, endpoint="again", instance=instance)["results"][0]["ticks"] == [0]
    calling.join()
    eventually(lambda: "shutdown second" in events.read_text(), "its hooks")
    lines = events.read_text().splitlines()
    assert lines.index("drained") < lines.index("shutdown second")
    assert lines.count("drained") == 1
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances again")


def test_nobody_reaches_a_worker_that_is_not_alive_while_its_shutdown_takes_long(relay: Served, events: Path) -> None:
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    events.write_text("")
    ailing = relay.call({"mode": "ail", "number": 1})["results"][0]
    try:
        eventually(lambda: "shutdown second" in events.read_text(), "the first of its hooks")
        eventually(lambda: ailing["instance"] not in relay.call()["instances"], "it has left discovery")
        meanwhile = relay.call(*[{"number": 1}] * 6)["results"]
        addressed = relay.call({}, endpoint="again", instance=int(ailing["instance"]))["results"][0]
        assert "shutdown first" not in events.read_text()
    finally:
        events.with_name("events.end").touch()
    assert [one["error"] for one in meanwhile if "error" in one] == []
    assert ailing["worker"] not in {one["worker"] for one in meanwhile}
    assert addressed["error"]["class"] == "WorkerLost"
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances again")
    events.with_name("events.end").unlink()


def test_a_worker_whose_computation_hangs_is_lost_to_who_waits_and_made_again(relay: Served, events: Path) -> None:
    """As one that was killed: none of its hooks runs, which could wait for what hangs."""
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    events.write_text("")
    before = relay.workers("Back")
    hung = relay.call({"mode": "compute", "number": 1})["results"][0]
    assert (hung["ticks"], hung["error"]["class"]) == ([0], "WorkerLost")
    meanwhile = relay.call(*[{"number": 1}] * 6)
    assert [one["error"] for one in meanwhile["results"] if "error" in one] == []
    assert hung["instance"] not in meanwhile["instances"]
    relay.wait_for(r"Back hangs and is ended: nothing has been heard for 1 s of what is computed")
    eventually(lambda: relay.workers("Back").get(hung["worker"]) not in (None, before[hung["worker"]]), "a new worker")
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances again")
    assert "shutdown" not in events.read_text()


def test_a_worker_that_is_told_to_end_once_it_is_registered_finishes_what_it_has_accepted(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with Served(tmp_path / "state", "tests/toys/hasty.py:Front", TOLD=str(told)) as served:
        served.wait_until_up()
        assert told.read_text() == "ended early, [0, 1, 2, 3]"
        assert served.stop() == 0
        assert served.leftovers() == []


def test_a_worker_that_never_comes_into_discovery_can_be_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    one = object.__new__(worker.Worker)
    looks = 0

    def registered() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            one.stopping.set()
        return False

    async def main() -> None:
        one.stopping, one._serving = asyncio.Event(), []
        monkeypatch.setattr(one, "_served", lambda: [object()])
        monkeypatch.setattr(one, "_discovers_by_file", lambda: True)
        monkeypatch.setattr(one, "_registered_in_files", registered)
        async with asyncio.timeout(20):
            await one._until_registered()

    asyncio.run(main())
    assert looks == 3


def test_a_worker_waits_for_a_nats_server_that_closes_its_connections_as_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            writer.write(b'INFO {"max_payload": 7}\r\n')
        writer.close()

    async def main() -> int:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{port}")
            return await object.__new__(worker.Worker)._max_payload()

    assert asyncio.run(main()) == 7
    assert asked == 2


@pytest.mark.parametrize("discovery", ["answers", "hangs"])
def test_one_that_breaks_leaves_discovery_before_its_hooks_and_is_ended_where_they_hang(
    discovery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "GIVE_UP_SECONDS", 0.5)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_end_after", lambda _: order.append("bounded"))
    order: list[str] = []

    async def noted(what: str) -> None:
        order.append(what)
        if what.startswith("leaves") and discovery == "hangs":
            await asyncio.Event().wait()

    async def breaks() -> None:
        raise RuntimeError("not alive any more")

    graph = load_graph(GRAPH)
    one = worker.Worker(graph, resolve(graph, Document()), "Middle", 0)
    monkeypatch.setattr(one, "_connect", lambda: noted("connects"))
    monkeypatch.setattr(one, "_run_hooks", noted)
    monkeypatch.setattr(one, "_serve", lambda: noted("serves"))
    monkeypatch.setattr(one, "_wait", breaks)
    monkeypatch.setattr(one, "_leave_discovery", lambda *, addressed: noted(f"leaves {addressed}"))
    with pytest.raises(RuntimeError, match="not alive any more"):
        asyncio.run(one.run())
    leaving = ["bounded", "leaves False", "leaves True"]
    assert order == ["connects", "on_start", "serves", *leaving, "on_shutdown"]


def test_one_that_hangs_leaves_discovery_and_is_ended_without_its_hooks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_end_after", lambda _: None)
    monkeypatch.setattr(worker.faulthandler, "dump_traceback", lambda: order.append("shows its threads"))
    order: list[str] = []

    class Ended(BaseException):
        """In place of the end of this process."""

    def end() -> None:
        order.append("ends")
        raise Ended

    async def noted(what: str) -> None:
        order.append(what)

    async def hangs() -> None:
        raise Hung("nothing has been heard")

    graph = load_graph(GRAPH)
    one = worker.Worker(graph, resolve(graph, Document()), "Middle", 0)
    monkeypatch.setattr(worker, "_end_now", end)
    monkeypatch.setattr(one, "_connect", lambda: noted("connects"))
    monkeypatch.setattr(one, "_run_hooks", noted)
    monkeypatch.setattr(one, "_serve", lambda: noted("serves"))
    monkeypatch.setattr(one, "_wait", hangs)
    monkeypatch.setattr(one, "_leave_discovery", lambda *, addressed: noted(f"leaves {addressed}"))
    with pytest.raises(Ended):
        asyncio.run(one.run())
    ended = order.index("ends")
    assert order[:ended] == ["connects", "on_start", "serves", "leaves False", "leaves True", "shows its threads"]
    assert "Middle hangs and is ended: nothing has been heard" in caplog.text


def test_a_worker_that_was_paused_is_passed_over_and_comes_back(relay: Served) -> None:
    """Longer than its lease in discovery: what a laptop's sleep does to every worker."""
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    instances = set(relay.call()["instances"])
    paused = relay.workers("Back")[1]
    os.kill(paused, signal.SIGSTOP)
    try:
        results = relay.call(*[{"number": 1}] * 4)["results"]
        assert sum("error" in one for one in results) <= 1  # the one that found out
        eventually(lambda: len(relay.call()["instances"]) == 2, "the paused one passed over")
        assert all("error" not in one for one in relay.call(*[{"number": 1}] * 4)["results"])
        eventually(lambda: not _registered(relay, instances - set(relay.call()["instances"])), "its lease over", 30)
    finally:
        os.kill(paused, signal.SIGCONT)
    eventually(lambda: set(relay.call()["instances"]) == instances, "the same three", 40)


def test_a_worker_that_stands_still_is_told_from_one_with_long_to_work(relay: Served) -> None:
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    paused = relay.workers("Back")[1]
    outcome: list[dict[str, object]] = []
    asks = [{"number": 3, "pause": 2 * wire.SILENT_SECONDS}] * 3
    calling = threading.Thread(target=lambda: outcome.extend(relay.call(*asks, at_once=True)["results"]))
    calling.start()
    time.sleep(1)
    os.kill(paused, signal.SIGSTOP)
    try:
        calling.join()
    finally:
        os.kill(paused, signal.SIGCONT)
    lost = [one for one in outcome if "error" in one]
    assert [one["error"]["class"] for one in lost] == ["WorkerLost"]  # type: ignore[index]
    assert lost[0]["worker"] == 1
    assert [one["ticks"] for one in outcome if "error" not in one] == [[0, 1, 2]] * 2
    eventually(lambda: len(relay.call()["instances"]) == 3, "the same three", 40)


def test_nobody_notices_a_worker_that_stood_still_before_it_was_asked(relay: Served) -> None:
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances")
    paused = relay.workers("Back")[1]
    os.kill(paused, signal.SIGSTOP)
    try:
        results = relay.call(*[{"number": 1}] * 6)["results"]
    finally:
        os.kill(paused, signal.SIGCONT)
    assert all("error" not in one for one in results)
    assert {one["worker"] for one in results} == {0, 2}
    eventually(lambda: len(relay.call()["instances"]) == 3, "the same three", 40)


def test_a_door_that_stands_still_is_made_again(relay: Served) -> None:
    """What listens for HTTP cannot be passed over by those who connect."""
    stopped = relay.workers("Front")[0]
    os.kill(stopped, signal.SIGSTOP)
    relay.wait_for(r"Front-0 has stood still")
    relay.wait_for(r"Front-0 is back")
    assert "error" not in relay.call({"number": 1})["results"][0]
    assert relay.workers("Front")[0] != stopped


class EndpointDouble:
    """Enters discovery, by a file, when it is asked for the third time."""

    def __init__(self, entry: Path):
        self._entry = entry
        self.asked = 0

    async def register_endpoint_instance(self) -> None:
        self.asked += 1
        if self.asked < 3:
            raise RuntimeError("discovery is not there")
        self._entry.touch()


def test_a_worker_tries_to_enter_discovery_again_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path))
    monkeypatch.setitem(dynamo_context, "instance_id", 0xABC)
    monkeypatch.setattr(worker, "REGISTRATION_CHECK", 0.001)
    one, endpoint = object.__new__(worker.Worker), EndpointDouble(tmp_path / "abc")
    one._draining = False
    monkeypatch.setattr(one, "_served", lambda: [endpoint])

    async def main() -> None:
        staying = asyncio.create_task(one._stay_registered())
        async with asyncio.timeout(20):
            while not one._registered_in_files():
                assert not staying.done()
                await asyncio.sleep(0.001)
        staying.cancel()

    asyncio.run(main())
    assert endpoint.asked == 3
    assert sum(record.exc_info is not None for record in caplog.records) == 2


def _registered(served: Served, instances: set[str]) -> list[Path]:
    return [entry for one in instances for entry in served.state.rglob(f"*{int(one):x}")]


def test_a_nats_server_that_died_is_started_again(relay: Served) -> None:
    server = next(pid for pid in relay.processes() if b"nats-server" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(server, signal.SIGKILL)
    relay.wait_for(r"nats-0 died \(signal 9\)")
    order = {"service": "middle", "endpoint": "relay"}
    eventually(lambda: "error" not in relay.call({"number": 1}, **order)["results"][0], "calls again", 30)
    eventually(lambda: len(relay.call()["instances"]) == 3, "three instances", 30)
