# SPDX-License-Identifier: Apache-2.0
"""What the report's serving rows make of what they were told. No engine runs here."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from benchmarks import checkpoints, encoders, standing, traces
from benchmarks.figures import Goal, Row
from benchmarks.load import Told, ask, session
from benchmarks.rows import answer, copies, encoder, goodput, kv, overlap, repeated, storm, transfer, weights
from benchmarks.standing import agree, as_long, lost, rotated
from benchmarks.traces import Span, Traces


def told(first: float = 0.1, text: str = "yes", gaps: Sequence[float] = (0.01, 0.01), failed: str = "") -> Told:
    """A letter is a token."""
    return Told(text, first, first + sum(gaps), list(gaps), failed)


class StandingDouble:
    """Arms that are there, and nothing behind them."""

    def __init__(self) -> None:
        self.asked_for: list[str] = []

    def arms(self, row: Row, model: str, names: Sequence[str]) -> dict[str, Any]:
        self.asked_for += names
        return {name: ArmDouble(name) for name in names}


class ArmDouble:
    """Runs two kinds of threads."""

    spins = False

    def __init__(self, name: str):
        self.name = self.url = name

    def masks(self) -> Counter[tuple[int, ...]]:
        return Counter({(0, 1): 7, (1,): 1})

    def pause(self) -> None:
        """There is nothing to stop."""

    def resume(self) -> None:
        """Nor to let go on."""


def test_answers_that_differ_make_a_row_void_unless_they_are_stocks() -> None:
    row = Row(1, "t", "s")
    agree(row, {"AGG": [told()], "STOCK": [told(text="other")], "OURS-agg": [told()]})
    assert not row.void and row.notes == ["STOCK: 1 of 1 answers are not AGG's"]
    agree(row, {"AGG": [told()], "OURS-agg": [told(text="other")]})
    assert row.void == "OURS-agg's answers differ from AGG's"
    row = Row(1, "t", "s")
    agree(row, {"AGG": [told()], "STOCK": [told(text="", failed="503: no")]})
    assert not row.void and row.notes == ["STOCK: 1 of 1 failed: 503: no"], "what failed does not differ too"
    agree(row, {"AGG": [told(failed="503: no")]})
    assert row.void == "a question to AGG failed"


def test_an_answer_under_load_has_the_tokens_that_were_asked_for() -> None:
    row = Row(1, "t", "s")
    as_long(row, {"AGG": [told(text="abc"), told(text=""), told(text="a", failed="500")]}, 3)
    assert not row.void and not row.notes, "what failed, or was given up, has no length"
    as_long(row, {"STOCK": [told(text="abcd")]}, 3)
    assert not row.void and row.notes == ["STOCK: 1 of 1 answers have 4 tokens, not 3"]
    as_long(row, {"OURS-agg": [told(text="abc"), told(text="ab")]}, 3)
    assert row.void == "OURS-agg's answers are not as long as was asked for"


def test_an_arm_is_lost_after_two_failures_in_a_row() -> None:
    failed = told(failed="503: no")
    assert lost([told(), failed, failed])
    assert not lost([]) and not lost([failed]) and not lost([failed, told(), failed]) and not lost([failed, told()])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_every_arm_begins_and_none_always_follows_the_same_one(count: int) -> None:
    arms = {str(number): number for number in range(count)}
    orders = [[name for name, _ in rotated(arms, repeat)] for repeat in range(2 * count)]
    assert all(sorted(order) == sorted(arms) for order in orders)
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(arms)
    for name in arms:
        before = [order[order.index(name) - 1] if order.index(name) else "nobody" for order in orders]
        assert max(map(before.count, before)) <= len(orders) // 2


@pytest.mark.parametrize(
    ("status", "body", "failed"),
    [
        (503, "not yet:\r\n\r\n  nobody\tis there", "503: not yet: nobody is there"),
        (200, 'data: {"error": "lost\\n\\nand gone"}\n\n', "lost and gone"),
        (500, "x" * 900, "500: " + "x" * 195),
    ],
)
def test_what_failed_is_said_in_one_line(status: int, body: str, failed: str) -> None:
    async def go() -> Told:
        async def reply(_: web.BaseRequest) -> web.Response:
            return web.Response(status=status, text=body)

        async with RawTestServer(reply) as server, session() as client:
            return await ask(client, str(server.make_url("")).rstrip("/"), {})

    assert asyncio.run(go()).failed == failed


def test_a_client_leaves_what_was_there_before_it_out_of_its_collections() -> None:
    async def go() -> None:
        async with session():
            assert not any(one is kept for one in gc.get_objects())

    kept: list[int] = []
    try:
        assert any(one is kept for one in gc.get_objects())
        asyncio.run(go())
    finally:
        gc.unfreeze()


# Models


def test_a_model_says_printable_characters_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    size = checkpoints.SIZES["llava-tiny"]
    checkpoints.write(size, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (head,) = (tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight"))
    alphabet = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    said = {alphabet[chr(character)] for character in checkpoints.PRINTABLE}
    assert {index for index, row in enumerate(head) if row.any()} == said
    assert any(name.startswith("vision_tower.vision_model.") for name in tensors), "as vLLM reads it"
    assert json.loads((tmp_path / "config.json").read_text())["image_seq_length"] == size.image_tokens == 16


def test_a_pictures_prefill_costs_about_half_its_encode_where_rows_serve() -> None:
    assert 0.4 < checkpoints.SIZES[checkpoints.SERVED].prefill_of_encode < 0.7


def test_another_size_is_another_checkpoint() -> None:
    assert len({checkpoints.hash_of(size) for size in checkpoints.SIZES.values()}) == len(checkpoints.SIZES)


# Row 1


def test_a_whole_answer_is_set_against_both_kinds_of_arm() -> None:
    whole = {"AGG": 0.1, "AGG-tuned": 0.08, "STOCK": 0.5, "STOCK-tuned": 0.2, "OURS-agg": 0.1, "OURS-disagg": 0.1}
    row = Row(1, "t", "s")
    resting = {"AGG-tuned": [0.5], "OURS-disagg": [0.02, 0.03]}
    answer.fill(row, {name: [told(one, gaps=[])] * 5 for name, one in whole.items()}, resting)
    assert {goal.what: (round(goal.median, 2), goal.limit) for goal in row.goals} == {
        "OURS-agg against AGG": (1.0, 1.0),
        "OURS-agg against AGG-tuned": (1.25, None),
        "OURS-disagg against AGG": (1.0, 1.2),
        "OURS-disagg against AGG-tuned": (1.25, None),
        "STOCK against OURS-disagg": (5.0, 3.5),
        "STOCK-tuned against OURS-disagg": (2.0, None),
        "OURS-disagg at rest": (2.5, 10.0),
    }
    assert row.met and not Goal("at rest", [10.0], "<", 10.0).met, "less than a tenth of a core"
    row = Row(1, "t", "s")
    failing = {name: [told(one, failed="503" * name.startswith("STOCK"))] for name, one in whole.items()}
    answer.fill(row, {name: 5 * answers for name, answers in failing.items()}, {})
    assert [goal.what for goal in row.goals if not goal.values] == ["STOCK against OURS-disagg"]
    assert not row.met and not row.void
    row = Row(1, "t", "s")
    answer.fill(row, {name: [told(text=name[:3])] * 5 for name in whole}, {})
    assert row.void == "OURS-agg's answers differ from AGG's" and not row.goals


def test_a_ratio_is_of_the_repeats_in_which_both_answered() -> None:
    failed = told(0.9, failed="503")
    pairs = {"STOCK": [failed, *[told(0.4, gaps=[])] * 5], "OURS-disagg": [told(0.1, gaps=[])] * 6}
    assert answer.compared(pairs, "STOCK", "OURS-disagg") == pytest.approx([4.0] * 5)
    pairs["STOCK"][3] = failed
    assert answer.compared(pairs, "STOCK", "OURS-disagg") == [], "too few"
    assert answer.compared(pairs, "AGG", "OURS-disagg") == []


def test_one_failure_of_stocks_loses_no_row_and_two_in_a_row_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()
    once, dead = {("STOCK", 1), ("STOCK", 4)}, {("STOCK-tuned", 3), ("STOCK-tuned", 4)}

    async def answered(client: Any, url: str, body: Any) -> Told:
        asked[url] += 1
        return told(failed="503" if (url, asked[url]) in once | dead else "")

    @asynccontextmanager
    async def no_turn(*_: Any) -> AsyncIterator[None]:
        yield

    async def nobody_rests(_: Any) -> dict[str, list[float]]:
        return {}

    monkeypatch.setattr(answer, "ask", answered)
    monkeypatch.setattr(answer, "turn", no_turn)
    monkeypatch.setattr(answer, "at_rest", nobody_rests)
    doubles: Any = StandingDouble()
    row = asyncio.run(answer.measure(doubles, 6))
    assert sorted(doubles.asked_for) == ["AGG", "AGG-tuned", "OURS-agg", "OURS-disagg", "STOCK", "STOCK-tuned"]
    assert (asked["AGG"], asked["STOCK"], asked["STOCK-tuned"]) == (8, 8, 4)
    goals = {goal.what: goal for goal in row.goals}
    assert len(goals["STOCK against OURS-disagg"].values) == 5 and not row.void
    assert "STOCK-tuned against OURS-disagg" not in goals
    assert "STOCK: 7 threads on cores 0, 1; 1 thread on core 1" in row.notes, "who binds its threads is told"


# Row 3


def takes(log: list[str], **seconds: float) -> dict[str, Any]:
    """Ways to hand over that take so long. The connector fails, and has ended, where it takes none."""

    def way(name: str) -> Any:
        async def take(nbytes: int) -> float:
            log.append(name)
            if not seconds[name]:
                raise RuntimeError(f"the connector-reader owner has ended:\n{name} broke")
            return seconds[name]

        return take

    return {name: way(name) for name in seconds}


def test_ways_to_hand_over_change_places() -> None:
    log: list[str] = []
    row = Row(3, "t", "s")
    arms = takes(log, arena=0.1, nixl=0.2, nixl_connect=6.0)
    seconds = asyncio.run(transfer.by_turns(arms, 1, 5, row))
    assert seconds == {"arena": [0.1] * 5, "nixl": [0.2] * 5, "nixl_connect": [6.0] * 5} and not row.notes
    turns = log[:: transfer.ROUNDS]
    orders = {tuple(turns[at : at + 3]) for at in range(0, len(turns), 3)}
    assert len(orders) > 3 and all(sorted(order) == sorted(arms) for order in orders)
    goals = {goal.what: goal for goal in transfer.goals("4 KiB", seconds)}
    assert goals["4 KiB: nixl_connect against it"].values == pytest.approx([60.0] * 5)


def test_a_connector_that_fails_costs_its_own_goal_alone() -> None:
    log: list[str] = []
    row = Row(3, "t", "s")
    arms = takes(log, arena=1e-4, nixl=0.2, nixl_connect=0.0)
    seconds = asyncio.run(transfer.by_turns(arms, 1, 5, row))
    assert row.notes == ["nixl_connect failed: the connector-reader owner has ended: … nixl_connect broke"]
    assert log.count("nixl_connect") == 1
    assert {arm: len(of) for arm, of in seconds.items()} == {"arena": 5, "nixl": 5}
    assert [goal.met for goal in transfer.goals("4 KiB", seconds)] == [True, False]
    assert list(arms) == ["arena", "nixl"], "nor is it asked for the next size"
    with pytest.raises(RuntimeError, match="nixl broke"):
        asyncio.run(transfer.by_turns(takes(log, arena=0.1, nixl=0.0), 1, 5, row))


# Row 4


def test_no_arm_encodes_a_picture_twice_and_the_first_turn_warms_up() -> None:
    seen: list[str] = []
    mosts: list[int | None] = []

    class StageDouble:
        def encode(self, pictures: Sequence[str], most: int | None) -> dict[str, Any]:
            seen.extend(pictures)
            mosts.append(most)
            return {"seconds": float(len(mosts))}

    stage: Any = StageDouble()
    row = Row(4, "t", "s")
    seconds = encoder.by_turns({"OURS": stage, "STOCK": stage, "STOCK-tuned": stage}, 1, row)
    assert seconds == {"OURS": [8.0], "OURS, one a forward": [7.0], "STOCK": [6.0], "STOCK-tuned": [5.0]}, "and back"
    assert mosts[:2] == [None, 1], "as many as the encode worker would have, and one"
    assert len(set(seen)) == len(seen) == 4 * (encoder.WARM_UP + encoder.WAITING)


class EncodeStageDouble:
    """Encodes sixteen pictures a second; ``fails`` at so many-th question, and has ended then. Its batches embed so far
    ``apart`` from one a forward."""

    def __init__(self, fails: int = 0, apart: float = 1e-7):
        self.asked, self._fails, self._apart = 0, fails, apart

    def encode(self, pictures: Sequence[str], most: int | None = None) -> dict[str, Any]:
        self.asked += 1
        if self.asked == self._fails:
            raise RuntimeError("STOCK's encode stage has ended:\nTraceback\nValueError: no such picture")
        return {"seconds": 1.0, "images": 1}

    def apart(self, pictures: Sequence[str]) -> float:
        assert len(set(pictures)) == encoder.COMPARED
        return self._apart

    def wait(self) -> None:
        """It is there."""

    def kill(self) -> None:
        """There is nothing to end."""


def rows_of_encode_stages(
    monkeypatch: pytest.MonkeyPatch, broken: Any, ours: Any = EncodeStageDouble
) -> tuple[Row, list[str]]:
    """Row 4 at doubles, and which were started; ``broken`` makes STOCK's."""
    started: list[str] = []

    def made(kind: str, model: Path) -> Any:
        started.append(kind)
        return broken() if kind == "STOCK" else ours()

    monkeypatch.setattr(encoders, "EncodeStage", made)
    monkeypatch.setattr(checkpoints, "directory", Path)
    return asyncio.run(encoder.measure(5)), started


def test_an_encode_worker_of_stocks_that_ends_costs_its_own_goal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row, started = rows_of_encode_stages(monkeypatch, lambda: EncodeStageDouble(fails=3))
    failed = "STOCK's encode stage has ended: … ValueError: no such picture"
    assert row.notes[0] == f"STOCK: its encode stage failed: {failed}"
    missed = [goal for goal in row.goals if not goal.met]
    assert [(goal.what, goal.values) for goal in missed] == [("tiny (2 layers of 64): OURS against STOCK", [])]
    assert {len(goal.values) for goal in row.goals if goal.met} == {5, 15}, "all others are there, and whole"
    assert started.count("STOCK") == 1, "it is not started again"
    assert not any(sample.arm.startswith("STOCK,") for sample in row.samples), "half its repeats are none"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (subprocess.CalledProcessError(1, "pip"), "Command 'pip' returned non-zero exit status 1."),
        (BrokenPipeError(), "BrokenPipeError"),
    ],
)
def test_an_encode_worker_of_stocks_that_cannot_be_installed_costs_its_own_goal_alone(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def broken() -> None:
        raise error

    row, _ = rows_of_encode_stages(monkeypatch, broken)
    assert row.notes[0] == f"STOCK: its encode stage failed: {said}"
    assert [goal.what for goal in row.goals if not goal.met] == ["tiny (2 layers of 64): OURS against STOCK"]


@pytest.mark.parametrize(("apart", "void"), [(1e-4, False), (1.1e-4, True), (float("nan"), True)])
def test_a_batch_embeds_as_one_a_forward_does(monkeypatch: pytest.MonkeyPatch, apart: float, void: bool) -> None:
    row, _ = rows_of_encode_stages(monkeypatch, EncodeStageDouble, lambda: EncodeStageDouble(apart=apart))
    assert bool(row.void) is void
    assert not void or "embeddings of a batch are " in row.void


def test_embeddings_are_compared_number_by_number_and_in_their_order() -> None:
    import torch

    one, other = torch.tensor([[1.0, -4.0]]), torch.tensor([[1.0, 2.0]])
    assert encoders.furthest([one, other], [one, other]) == 0.0
    assert encoders.furthest([one, other], [other, one]) == 1.5, "pictures that were mixed up"
    assert encoders.furthest([one + 4e-4], [one]) == pytest.approx(1e-4, rel=0.01), "of the largest number"
    assert encoders.furthest([one], [one[0]]) == float("inf")
    assert encoders.furthest([one, one * float("nan")], [one, one]) == float("inf")


def test_an_encode_worker_of_ours_that_ends_costs_the_row() -> None:
    stage: Any = EncodeStageDouble(fails=1)
    with pytest.raises(RuntimeError, match="no such picture"):
        encoder.by_turns({"OURS": stage}, 1, Row(4, "t", "s"))


def test_batches_must_win_where_overhead_rules_and_keep_up_elsewhere() -> None:
    rates = {"OURS": [4.0], "OURS, one a forward": [4.1], "STOCK": [1.0], "STOCK-tuned": [2.0]}
    wins, tuned = encoder.goals(encoder.OVERHEAD, "tiny", rates)
    assert (wins.values, wins.limit, wins.met) == ([4.0], 2.0, True)
    assert (tuned.values, tuned.limit) == ([2.0], None)
    del rates["STOCK-tuned"]
    keeps_up, beside = encoder.goals("llava-b32", "B/32", rates)
    assert (keeps_up.limit, keeps_up.met) == (0.97, True) and keeps_up.median == pytest.approx(4.0 / 4.1)
    assert (beside.values, beside.limit) == ([4.0], None), "against Dynamo's it is shown"
    rates["OURS, one a forward"] = [2.0]
    keeps_up, wins = encoder.goals("llava-b32", "B/32", rates)
    assert (keeps_up.limit, wins.limit) == (0.97, 2.0), "where batches win as much, overhead rules"


# Row 5


def test_a_repeated_picture_is_asked_about_in_new_words_and_its_text_is_as_long() -> None:
    def parts(kind: str, repeat: int) -> list[Any]:
        body: Any = repeated.asked(kind, repeat, 40)
        return list(body["messages"][0]["content"])

    first, seen, text = (parts(kind, 3) for kind in (repeated.FIRST, repeated.SEEN, repeated.TEXT))
    assert first[1] == seen[1] and seen[1]["type"] == "image_url", "the same picture"
    assert parts(repeated.SEEN, 4)[1] != seen[1]
    others = (parts(repeated.SEEN, 4), parts(repeated.TEXT, 4), parts(repeated.BETWEEN, 3))
    beginnings = {one[0]["text"][:16] for one in (first, seen, text, *others)}
    assert len(beginnings) == 6, "no prefix cache has seen any of them"
    assert first[2] != seen[2], "another question"
    assert len(text[0]["text"]) == len(seen[0]["text"]) + 40 + len(seen[2]["text"])


def test_a_picture_seen_before_is_set_against_text() -> None:
    kinds = {
        repeated.FIRST: [told(0.9), told(0.8), told(0.9), told(0.8)],
        repeated.SEEN: [told(0.22), told(0.22), told(0.21), told(0.21)],
        repeated.TEXT: [told(0.2)] * 4,
    }
    row = Row(5, "t", "s")
    repeated.fill(row, dict.fromkeys(repeated.ARMS, kinds))
    assert [goal.what for goal in row.goals] == [
        "OURS-disagg, against text",
        "OURS-disagg-2, at the other prefill worker, against text",
        "OURS-disagg-2, at the same prefill worker, against text",
        "OURS-agg, against text",
    ]
    assert row.goals[0].values == pytest.approx([1.1, 1.1, 1.05, 1.05]) and row.met
    assert [goal.values for goal in row.goals[1:3]] == [pytest.approx([1.1] * 2), pytest.approx([1.05] * 2)]
    assert [sample.arm for sample in row.samples][:3] == [
        "AGG, new picture",
        "AGG, seen before",
        f"AGG, {repeated.TEXT}",
    ]


def test_both_orders_are_asked_at_the_other_prefill_worker_and_at_the_same_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls go to two workers by turns."""
    calls = {name: 0 for name in repeated.ARMS}
    showed: dict[str, int] = {}
    kinds: dict[int, str] = {}
    asked_at: Counter[tuple[str, bool]] = Counter()

    def asked(kind: str, repeat: int, length: int) -> dict[str, Any]:
        body = asked_really(kind, repeat, length)
        kinds[id(body)] = kind
        bodies.append(body)  # its id stays its own
        return body

    async def answered(client: Any, url: str, body: Any) -> Told:
        calls[url] += 1
        kind = kinds[id(body)]
        if kind == repeated.FIRST:
            showed[url] = calls[url] % 2
            orders[url] = []
        orders[url].append(kind)
        if kind == repeated.SEEN:
            elsewhere = calls[url] % 2 != showed[url]
            if url == repeated.TWO:
                asked_at["other" if elsewhere else "same", repeated.TEXT in orders[url]] += 1
            return told(0.4 if elsewhere else 0.2)
        return told(0.2)

    async def as_long(*_: Any) -> int:
        return 40

    @asynccontextmanager
    async def turn(client: Any, arm: Any, row: Row) -> AsyncIterator[None]:
        calls[arm.url] = 1  # the question that is not timed
        yield

    asked_really, bodies, orders = repeated.asked, list[Any](), dict[str, list[str]]()
    for name, double in (("ask", answered), ("asked", asked), ("filler", as_long), ("prompt_tokens", as_long)):
        monkeypatch.setattr(repeated, name, double)
    monkeypatch.setattr(repeated, "turn", turn)
    doubles: Any = StandingDouble()
    row = asyncio.run(repeated.measure(doubles, 5))
    _, other, same, _ = row.goals
    assert other.values == pytest.approx([2.0] * 6) and not other.met
    assert same.values == pytest.approx([1.0] * 6) and same.met, "as many of each, however few are asked for"
    asked_at -= Counter({("same", True): 1})  # the turn that warms up
    assert asked_at == dict.fromkeys([(who, first) for who in ("other", "same") for first in (True, False)], 3)


# Row 6


def test_a_storm_waits_for_nobody_and_ends_with_the_stream() -> None:
    async def go() -> tuple[int, list[Told]]:
        over, answered = asyncio.Event(), asyncio.Event()
        asked = 0

        async def one(number: int) -> Told:
            nonlocal asked
            asked += 1
            assert number == asked - 1
            if asked == 5:
                over.set()
            await answered.wait()
            return told()

        running = asyncio.ensure_future(storm.until(over, 1000.0, 1, one))
        await asyncio.wait_for(over.wait(), 20)
        at_end = asked
        answered.set()
        return at_end, await asyncio.wait_for(running, 20)

    asked, answers = asyncio.run(go())
    assert asked == 5, "five at once, none of them answered"
    assert len(answers) == 5, "and none after the end"


STORY = "s" * storm.TOKENS


def pace(stall: float, text: str = STORY, failed: str = "", said: str = "y") -> storm.Pace:
    quiet = [0.01] * 199
    stormy = told(gaps=[*quiet[2:], stall, stall], text=text)
    return storm.Pace(told(gaps=quiet, text=STORY), stormy, [told(failed=failed, text=said)])


def test_stalls_count_in_the_tail_of_a_stream() -> None:
    row = Row(6, "t", "s")
    storm.fill(row, {"AGG": [pace(0.5)] * 3, "OURS-disagg": [pace(0.0105)] * 3})
    beside, together, goal, _ = row.goals
    assert together.values == pytest.approx([50.0]) and together.limit is None
    assert goal.values == pytest.approx([1.05] * 3) and row.met
    assert beside.values == pytest.approx([50.0] * 3) and beside.limit is None
    assert [sample.median for sample in row.samples] == pytest.approx([10, 500, 10, 10.5])


def test_a_storm_that_failed_shows_nothing() -> None:
    row = Row(6, "t", "s")
    storm.fill(row, {"AGG": [pace(0.5)], "OURS-disagg": [pace(0.01, failed="503: full")]})
    assert row.void == "OURS-disagg: 1 questions of the storm failed: 503: full" and not row.goals
    row = Row(6, "t", "s")
    storm.fill(row, {"AGG": [pace(0.5, text=STORY.upper())], "OURS-disagg": [pace(0.01)]})
    assert row.met and "AGG: 1 of 1 streams said something else in the storm" in row.notes


@pytest.mark.parametrize("wrong", [{"text": STORY[1:]}, {"said": "yes"}])
def test_an_answer_in_a_storm_is_as_long_as_was_asked_for(wrong: dict[str, str]) -> None:
    row = Row(6, "t", "s")
    storm.fill(row, {"AGG": [pace(0.5)], "OURS-disagg": [pace(0.01, **wrong)]})
    assert row.void == "OURS-disagg's answers are not as long as was asked for" and not row.goals


def test_the_storm_and_the_quiet_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    async def answered(client: Any, url: str, body: Any) -> Told:
        log.append("picture" if body["max_tokens"] == storm.QUESTION_TOKENS else "stream")
        await asyncio.sleep(0)
        return told()

    monkeypatch.setattr(storm, "ask", answered)
    client: Any = None
    arm: Any = SimpleNamespace(url="")
    quiet_first, storm_first = ["stream", "stream", "picture"], ["stream", "picture", "stream"]
    for repeat, order in ((0, quiet_first), (1, storm_first)):
        log.clear()
        row = Row(6, "t", "s", open_loop=True)
        asyncio.run(storm._one(client, arm, repeat, row, storm.RATE))
        assert log == order
        assert len(row.client) == 1, "the client's share of a core is taken in the storm alone"


def test_one_disturbed_repeat_is_the_99th_percentile_of_all_gaps_and_not_the_goal() -> None:
    row = Row(6, "t", "s")
    disturbed = pace(0.01)
    disturbed = storm.Pace(disturbed.quiet, told(gaps=[0.01] * 189 + [0.5] * 10, text=STORY), disturbed.storm)
    storm.fill(row, {"AGG": [pace(0.01)] * 5, "OURS-disagg": [*[pace(0.01)] * 4, disturbed]})
    goal, together = row.goals[2:]
    assert (goal.limit, goal.median) == (1.1, pytest.approx(1.0)) and row.met
    assert together.values == pytest.approx([50.0])


def test_a_stream_that_failed_at_once_is_why_its_row_is_void() -> None:
    nothing = storm.Pace(told(text=STORY), told(text="", gaps=[], failed="503: gone"), [])
    row = Row(6, "t", "s")
    storm.fill(row, {"AGG": [nothing], "OURS-disagg": [nothing]})
    assert row.void == "AGG: 1 questions of the storm failed: 503: gone"


def test_questions_come_at_one_rate_for_all_arms_which_follows_aggs_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    async def noted(over: asyncio.Event, rate: float, seed: int, one: Any) -> list[Told]:
        rates.append(rate)
        return [told(text="y")]

    async def answered(client: Any, url: str, body: Any) -> Told:
        tokens = body["max_tokens"]
        gap = {"AGG": 0.004 if len(rates) < 2 else 0.008, "OURS-disagg": 0.1}[url]
        return told(text="s" * tokens, gaps=[gap, gap, 0.9])

    async def woken(*_: Any) -> None:
        """It was awake."""

    for name, double in (("until", noted), ("ask", answered), ("picture", str)):
        monkeypatch.setattr(storm, name, double)
    monkeypatch.setattr(standing, "_wake", woken)
    doubles: Any = StandingDouble()
    asyncio.run(storm.measure(doubles, 5))
    assert rates == pytest.approx([storm.RATE] * 2 + [5.0] * 2 + [2.5] * 8), "one in the time of 50 of its tokens"
    assert storm.rate_of(told(failed="503", gaps=[])) == storm.RATE
    drawn = storm.DRAWN * storm.EVERY / storm.TOKENS
    assert drawn > 4, "of a stream as slow as a fourth"


# Row 7


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (told(1.0, gaps=[0.1, 0.1]), True),
        (told(1.01, gaps=[0.1, 0.1]), False),
        (told(1.0, gaps=[0.02, 0.2]), False),
        (told(1.0, gaps=[0.1]), True),
        (told(1.0, gaps=[0.3]), False),
        (told(1.0, "s" * 24, [0.01] * 22 + [0.9]), True),
        (told(1.0, "s" * 24, [0.01] * 21 + [0.2] * 2), False),
        (told(1.0, "s" * 24, [0.01] * 22 + [9.0]), False),
        (told(1.0, gaps=[]), False),
        (told(0.1, failed="500"), False),
    ],
)
def test_a_request_is_good_within_its_limits_in_the_mean_and_in_nearly_every_gap(answer: Told, kept: bool) -> None:
    assert goodput.Limits(first=1.0, token=0.1).kept(answer) is kept


def test_limits_and_rates_come_from_one_request_after_the_other() -> None:
    limits, capacity = goodput.calibrated([told(0.2), told(0.3), told(0.9)])
    assert (limits.first, limits.token) == pytest.approx((0.9, 0.03))
    assert capacity == pytest.approx(1 / 0.32)
    assert min(goodput.LOADS) < 1 < max(goodput.LOADS), "one that AGG can do, and one that it cannot"
    assert max(goodput.LOADS) >= 2 * min(goodput.LOADS), "though AGG keeps all of the lowest, twice as good is possible"


def test_every_arm_sees_the_same_arrivals_at_each_rate_and_no_picture_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    async def answered(client: Any, url: str, body: Any) -> Told:
        seen.append([part["image_url"]["url"] for part in body["messages"][0]["content"] if "image_url" in part])
        return told()

    async def rated(rate: float, seconds: float, seed: int, one: Any) -> list[Told]:
        begun.append((rate, seconds, seed))
        return [await one(number) for number in range(2)]

    monkeypatch.setattr(goodput, "ask", answered)
    monkeypatch.setattr(goodput, "at_rate", rated)
    client: Any = None
    arm: Any = SimpleNamespace(url="")
    of, begun = goodput.Measured(), list[tuple[float, float, int]]()
    for repeat in range(2):
        asyncio.run(goodput._windows(client, arm, [0.8, 1.3, 2.0], goodput.Limits(1.0, 0.1), repeat, of))
    assert [(rate, seconds) for rate, seconds, _ in begun] == [(rate, goodput.WINDOW) for rate in (0.8, 1.3, 2.0)] * 2
    assert len({seed for *_, seed in begun}) == 6, "each window has arrivals of its own"
    assert len({url for urls in seen for url in urls}) == len(seen) * goodput.PICTURES == 48
    assert [[len(window) for window in windows] for windows in of.windows] == [[2, 2, 2], [2, 2, 2]]
    del begun[:]
    asyncio.run(goodput._windows(client, arm, [0.8, 1.3, 2.0], goodput.Limits(0.01, 0.1), 2, of))
    assert [rate for rate, *_ in begun] == [0.8] and [len(window) for window in of.windows[2]] == [2, 0, 0]


@pytest.mark.parametrize(("kept", "windows"), [(0, [4, 0, 0]), (1, [4, 4, 0]), (2, [4, 4, 0]), (3, [4, 4, 4])])
def test_an_arm_is_asked_at_a_higher_rate_where_it_kept_enough_at_the_one_below(
    kept: int, windows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def rated(rate: float, seconds: float, seed: int, one: Any) -> list[Told]:
        return [told(0.1)] * kept + [told(9.0)] * (4 - kept)

    monkeypatch.setattr(goodput, "at_rate", rated)
    client: Any = None
    arm: Any = SimpleNamespace(url="")
    of = goodput.Measured()
    asyncio.run(goodput._windows(client, arm, [0.8, 1.3, 2.0], goodput.Limits(1.0, 0.1), 0, of))
    assert [len(window) for window in of.windows[0]] == windows


def test_the_best_rate_of_a_repeat_counts_and_beside_it_that_of_all_repeats() -> None:
    good, late = told(0.1), told(9.0)
    windows = [[[good, late], [good, good], [late]], [[good] * 3, [late] * 4, []]]
    of = goodput.Measured(windows=windows)
    limits = goodput.Limits(1.0, 1.0)
    assert of.goodput(limits) == pytest.approx([2 / goodput.WINDOW, 3 / goodput.WINDOW])
    assert of.together(limits) == pytest.approx(2 / goodput.WINDOW), "four at the lowest rate, in two windows"
    assert len(of.loaded) == 12


def test_nothing_good_counts_as_half_a_request() -> None:
    assert goodput.gains([2.0, 2.0, 0.0], [1.0, 0.0, 0.0]) == [2.0, 4.0 * goodput.WINDOW, 0.0]
    assert goodput.gains([2.0], [0.0], 5) == [20.0 * goodput.WINDOW], "of all repeats together"


@pytest.mark.parametrize(("alone", "loaded", "hopeless"), [(9.0, 9.0, True), (0.1, 9.0, False), (9.0, 0.1, False)])
def test_an_arm_that_keeps_nothing_is_asked_no_more(alone: float, loaded: float, hopeless: bool) -> None:
    of, limits = goodput.Measured([told(alone)] * 3), goodput.Limits(1.0, 1.0)
    assert not of.hopeless(limits), "nor before it was asked"
    of.windows.append([[told(loaded)], [], []])
    assert of.hopeless(limits) is hopeless


def test_nothing_that_is_good_is_given_up() -> None:
    limits = goodput.Limits(first=1.0, token=0.125)
    latest = told(1.0, text="s" * goodput.TOKENS, gaps=[0.125] * (goodput.TOKENS - 1))
    assert limits.kept(latest) and latest.whole < limits.too_late < 2 * latest.whole


def test_goodput_counts_good_requests_and_throughput_all() -> None:
    said = "yes" * (goodput.TOKENS // 3)
    good, late = told(0.1, said), told(9.0, said)
    limits = goodput.Limits(1.0, 1.0)
    arms = {name: goodput.Measured([], [[[late], [good, late], []]], [[good]], [1.0]) for name in goodput.TUNED}
    other = told(0.1, said.upper())
    arms["OURS-disagg"] = goodput.Measured([], [[[good], [good, other], [late] * 3]], [[other]], [0.96])
    row = Row(7, "t", "s")
    goodput.fill(row, arms, limits)
    assert [(goal.values, goal.limit) for goal in row.goals] == [
        ([2.0], 2.0),
        ([2.0], None),
        ([2.0], 1.3),
        *[([2.0], None)] * 5,
        ([0.96], 0.95),
        ([0.96], None),
        ([3.0], None),
    ]
    assert row.goals[1].what.endswith("together") and row.goals[-1].what == "the most that was possible against AGG"
    assert row.met and row.notes == ["OURS-disagg: 2 of 7 answers under load are not AGG's"]
    del arms["AGG-tuned"], arms["STOCK-tuned"]
    row = Row(7, "t", "s")
    goodput.fill(
        row, arms | {"STOCK": goodput.Measured([], [[[good], [told(failed="500: no"), told(9.0)], []]])}, limits
    )
    assert row.met and len(row.goals) == 6 and "STOCK: 1 requests failed under load: 500: no" in row.notes
    assert f"STOCK: 1 of 3 answers have 3 tokens, not {goodput.TOKENS}" in row.notes
    assert "--tuned" in row.notes[-1], "a row without them says where they are"
    row = Row(7, "t", "s")
    goodput.fill(row, arms | {"STOCK": goodput.Measured([], [[[], [], []]])}, limits)
    assert "STOCK was not asked in 1 of them: it had kept none before, alone or loaded" in row.notes
    del arms["STOCK"]
    row = Row(7, "t", "s")
    goodput.fill(row, arms, limits)
    assert [str(goal) for goal in row.goals if not goal.met] == ["not measured; goal ≥ 1.30 times"]
    assert not row.met and row.as_json()["goals"][2]["median"] is None
    row = Row(7, "t", "s")
    goodput.fill(row, arms | {"AGG": goodput.Measured([], [[[good], [late], []]], [[told()]], [1.0])}, limits)
    assert row.void == "AGG's answers are not as long as was asked for"
    row = Row(7, "t", "s")
    goodput.fill(
        row, arms | {"AGG": goodput.Measured([], [[[good], [told(failed="500: no")], []]], [[good]], [1.0])}, limits
    )
    assert row.void == "requests to AGG failed"


def test_rows_under_load_measure_the_clients_share_while_requests_come_at_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the first turn to the last figure, with answers that come at once."""

    async def answered(client: Any, url: str, body: Any) -> Told:
        tokens = body["max_tokens"]
        await asyncio.sleep(0.01)
        return told(0.2 if url == "AGG" else 0.1, "s" * tokens, [0.01] * (tokens - 1))

    async def woken(*_: Any) -> None:
        """It was awake."""

    for module in (goodput, storm):
        monkeypatch.setattr(module, "ask", answered)
        monkeypatch.setattr(module, "picture", str)
    monkeypatch.setattr(standing, "_wake", woken)
    monkeypatch.setattr(goodput, "WINDOW", 0.2)
    doubles: Any = StandingDouble()
    row = asyncio.run(goodput.measure(doubles, 5))
    assert len(row.client) == 5 * len(goodput.ARMS), "not while it was calibrated, nor in bursts"
    assert not row.void and [len(goal.values) for goal in row.goals] == [5, 1, 5, 1, 5, 5]
    assert "AGG: 7 threads on cores 0, 1; 1 thread on core 1" in row.notes
    row = asyncio.run(storm.measure(doubles, 5))
    assert len(row.client) == 6 * len(storm.ARMS) and not row.void
    assert [len(goal.values) for goal in row.goals] == [5, 1, 5, 1]


# Row 8


def span(name: str, began: float, ended: float) -> Span:
    return Span("a", name, began, ended)


@pytest.mark.parametrize(
    ("one", "other", "seconds"),
    [
        ([(0, 4)], [(4, 6)], 0),
        ([(0, 4)], [(3, 6)], 1),
        ([(0, 2), (1, 4)], [(3, 6)], 1),
        ([(0, 1), (2, 3)], [(0, 9)], 2),
        ([(0, 9)], [(1, 2), (1, 3), (5, 6)], 3),
        ([], [(1, 2)], 0),
    ],
)
def test_seconds_in_which_both_ran_count_once(one: list[Any], other: list[Any], seconds: float) -> None:
    assert traces.overlap([span("a", *at) for at in one], [span("b", *at) for at in other]) == seconds


def of_request(prefilled_from: float) -> list[Span]:
    encodes = [span(overlap.ENCODE, place, place + 1.0) for place in range(4)]
    return [*encodes, span(overlap.PREFILL, prefilled_from, 5.0), span("Processor.chat", 0.0, 9.0)]


def test_a_graph_that_waits_for_all_pictures_overlaps_nothing() -> None:
    row = Row(8, "t", "s")
    overlap.fill(row, [told(5.0)], [told(4.0)], [of_request(4.0)])
    assert row.goals[0].values == [1.0] and not row.met
    steps = next(one for one in row.samples if one.unit == "decode steps")
    assert steps.values == pytest.approx([100.0]), "four seconds for four pictures, and 10 ms a token"
    assert row.notes[1].startswith("asked in pieces: 0.8 times")
    assert row.notes[2].endswith("it began 3,000 ms after the first one")


def test_what_overlaps_is_what_is_won() -> None:
    row = Row(8, "t", "s")
    overlap.fill(row, [told(5.0)], [told(4.0)], [of_request(1.0)])
    assert row.goals[0].values == [5.0 / 8.0] and row.met and len(row.notes) == 2


@pytest.mark.parametrize(("prefill", "floor"), [(1.0, 5 / 8), (0.5, 4.5 / 6), (2.0, 9 / 12), (0.0, 1.0)])
def test_overlap_is_worth_most_where_both_take_as_long(prefill: float, floor: float) -> None:
    assert overlap.least(prefill, 4) == pytest.approx(floor)


def test_spans_are_collected_over_http_until_all_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, headers = traces.new_trace()
    assert headers["traceparent"].split("-")[1] == trace and headers["traceparent"].endswith("-01")

    def send(collector: Traces, name: str) -> None:
        request = ExportTraceServiceRequest()
        resource = request.resource_spans.add()
        resource.resource.attributes.add(key="service.name").value.string_value = "PrefillWorker"
        one = resource.scope_spans.add().spans.add()
        one.name, one.trace_id = name, bytes.fromhex(trace)
        one.start_time_unix_nano, one.end_time_unix_nano = 1_500_000_000, 2_000_000_000
        url = f"{collector.environment['OTEL_EXPORTER_OTLP_ENDPOINT']}/v1/traces"
        urllib.request.urlopen(urllib.request.Request(url, request.SerializeToString()), timeout=20).close()

    with Traces() as collector:
        for name in ("encode", "encode", "prefill"):
            send(collector, name)
        spans = asyncio.run(collector.trace(trace, {"encode": 2, "prefill": 1}))
        assert sorted(spans, key=lambda one: one.name)[2] == Span(trace, "prefill", 1.5, 2.0, "PrefillWorker")
        monkeypatch.setattr(traces, "ARRIVE_SECONDS", 0.0)
        with pytest.raises(TimeoutError, match="'encode': 1"):
            asyncio.run(collector.trace(trace, {"encode": 3, "prefill": 1}))


# Row 9


def test_a_handed_over_cache_is_set_against_one_engine() -> None:
    row = Row(9, "t", "s")
    kv.fill(row, {"AGG": [told(0.2)], "AGG-tuned": [told(0.1)], "OURS-agg": [told(0.1)], "OURS-disagg": [told(0.22)]})
    assert [(goal.median, goal.limit) for goal in row.goals] == [
        (pytest.approx(1.1), 1.15),
        (pytest.approx(2.2), None),
        (pytest.approx(2.2), None),
    ]
    assert row.met and any("pulls the KV cache once prefill is over" in note for note in row.notes)


# Row 13


def test_encoders_begin_at_once_and_each_has_ended_before_the_next_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class LoaderDouble:
        def __init__(self, small: Path, model: Path, number: int):
            self._number = number
            log.append(f"begin {number}")

        def answer(self) -> None:
            log.append(f"{self._number} is there")

        def ask(self, what: str) -> dict[str, int]:
            log.append(f"{what} {self._number}")
            return {"uss": 110, "peak": 120, "parameters": 100, "read": 0}

        def kill(self) -> None:
            log.append(f"end {self._number}")

    monkeypatch.setattr(weights, "_loader", LoaderDouble)
    monkeypatch.setattr(weights, "part_bytes", lambda model: (100, 300))
    monkeypatch.setattr(checkpoints, "directory", Path)
    row = asyncio.run(weights.measure(2, Path()))
    assert log[:8] == ["begin 0", "begin 1", "0 is there", "1 is there", "load 0", "end 0", "load 1", "end 1"]
    assert row.goals[0].values == [1.1, 1.1] and row.met


# Row 14


MAPS = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("there", flush=True)
time.sleep(600)
"""


def test_a_copy_is_a_process_that_has_a_file_of_it_mapped(tmp_path: Path) -> None:
    for name in ("text_encoder", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    graph = copies.PictureGraph("double", [], 1)
    try:
        for name in ("text_encoder", "vae", "text_encoder"):
            command = [sys.executable, "-c", MAPS, str(tmp_path / name / "model.safetensors")]
            graph._processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True))
        for process in graph._processes:
            assert process.stdout is not None
            with process.stdout as said:
                assert said.readline() == b"there\n"
        assert graph.copies(tmp_path / "text_encoder") == 2
    finally:
        graph.close()


def test_repeats_add_no_image_workers_beyond_five(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(copies, "_measure", lambda workers, pipeline: Row(14, "t", f"{workers} workers"))
    for repeats in (5, 30):
        assert asyncio.run(copies.measure(repeats, tmp_path)).setting == "5 workers"
