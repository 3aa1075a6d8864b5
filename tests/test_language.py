# SPDX-License-Identifier: Apache-2.0
"""What an engine of a stage does beside vLLM's, over a double of that: no engine, no weights."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from dynamo_epd import tracing
from dynamo_epd.engine import language, lease
from dynamo_epd.engine.delta import Delta, Reasoning
from dynamo_epd.engine.language import HANDED_OVER, ImageInput, LanguageEngine, encode_sampling, multi_modal_data
from dynamo_epd.engine.lease import PULLED
from dynamo_epd.engine.scheduler import FailOnPreemption
from dynamo_epd.errors import InternalError, InvalidRequest, Preempted, Retryable
from dynamo_epd.sdk.serve import worker_environment
from tests.collector import Collector

KV = {
    "do_remote_prefill": True,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "h",
    "remote_port": 1,
    "tp_size": 1,
}


class EngineDouble:
    """An AsyncLLM whose EngineCore says that one prefill after the other has ended, and whose renderer makes two
    tokens of a 9. ``given`` is what it was to generate from."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=64)
        self.vllm_config = SimpleNamespace(
            structured_outputs_config=SimpleNamespace(reasoning_parser=""), cache_config=SimpleNamespace(block_size=4)
        )
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
        self.renderer = SimpleNamespace(
            default_cmpl_tok_params=SimpleNamespace(with_kwargs=lambda **_: None), render_cmpl_async=self._render
        )
        self.given: list[dict[str, Any]] = []
        self.rejected: list[str] = []
        self.engine_core = SimpleNamespace(get_output_async=self._said, outputs_queue=asyncio.Queue())
        self.ended = 0

    async def _said(self) -> Any:
        self.ended += 1
        output = SimpleNamespace(request_id=f"call-{self.ended}-1a2b3c4d", kv_transfer_params={"blocks": self.ended})
        return SimpleNamespace(outputs=[output, SimpleNamespace(request_id="other-1", kv_transfer_params=None)])

    async def _render(self, prompts: list[Any], _: Any) -> list[Any]:
        ids = prompts[0]["prompt_token_ids"]
        return [{"prompt_token_ids": [token for token in ids for _ in range(2 if token == 9 else 1)]}]

    async def generate(self, rendered: Any, params: Any, request_id: str, **more: Any) -> Any:
        self.given.append({**rendered, **more})
        return
        yield

    async def notify_kv_transfer_request_rejected(self, request_id: str, kv: Any) -> None:
        self.rejected.append(request_id)

    async def abort(self, request_id: str) -> None:
        """There is nothing to end."""

    async def is_sleeping(self) -> bool:
        return False


def test_the_youngest_of_what_was_handed_over_can_be_withdrawn_and_the_rest_is_forgotten() -> None:
    async def main() -> None:
        double = EngineDouble()
        engine = LanguageEngine(double, "prefill", silence=1.0)
        last = HANDED_OVER + 8
        for _ in range(last):
            await double.engine_core.get_output_async()
        assert await engine.withdraw(f"call-{last}") == {"blocks": last}
        assert await engine.withdraw(f"call-{last}") is None, "once"
        assert await engine.withdraw("call-9") == {"blocks": 9}
        assert await engine.withdraw("call-8") is None, "forgotten"

    asyncio.run(main())


def test_a_prompt_that_is_withdrawn_before_it_came_is_not_prefilled() -> None:
    async def main() -> None:
        double = EngineDouble()
        engine = LanguageEngine(double, "prefill", silence=1.0)
        told, looked = asyncio.Event(), asyncio.Event()

        async def is_sleeping() -> bool:
            told.set()
            await looked.wait()
            return False

        async def refused(request_id: str) -> None:
            with pytest.raises(Retryable, match="left before"):
                await engine.prefill(request_id, [1, 2], [], cache_salt=None)

        double.is_sleeping = is_sleeping  # type: ignore[method-assign]
        withdrawing = asyncio.create_task(engine.withdraw("call-0"))
        await told.wait()
        await refused("call-0")
        looked.set()
        assert await withdrawing is None
        await refused("call-0")
        assert double.given == []
        with pytest.raises(Retryable, match="without a KV cache"):
            await engine.prefill("call-00", [1, 2], [], cache_salt=None)
        assert len(double.given) == 1

    asyncio.run(main())


def generated(double: EngineDouble, sampling: dict[str, Any] | None = None, **more: Any) -> None:
    from vllm import SamplingParams

    async def main() -> None:
        engine = LanguageEngine(double, "decode", silence=1.0)
        text = encode_sampling(SamplingParams(**sampling or {}))
        async for _ in engine.generate("r", [1, 9, 2], [], sampling=text, cache_salt=None, **more):
            """It says nothing."""

    asyncio.run(main())


def test_what_was_streamed_is_no_part_of_what_is_rendered() -> None:
    """Its token that looks like a placeholder stays one, and so would all that a text could not give back."""
    double = EngineDouble()
    generated(double, streamed=[9, 5])
    assert double.given[0]["prompt_token_ids"] == [1, 9, 9, 2, 9, 5]


def test_a_kv_cache_is_pulled_in_time_or_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    double = EngineDouble()
    generated(double, kv=KV)
    assert (len(double.given), double.rejected) == (1, [])
    monkeypatch.setattr(language, "STILL_SECONDS", -1.0)
    generated(double)  # it has none
    with pytest.raises(Preempted):
        generated(double, kv=KV)
    assert (len(double.given), double.rejected) == (2, ["r"])


def test_a_kv_cache_whose_request_does_not_reach_the_engine_is_given_back() -> None:
    double = EngineDouble()
    with pytest.raises(InvalidRequest):
        generated(double, kv=KV, streamed=range(200))
    assert (double.given, double.rejected) == ([], ["r"])

    async def left_while_it_is_rendered() -> None:
        async def render(*_: Any) -> Any:
            await asyncio.sleep(60)

        double.renderer.render_cmpl_async = render
        engine = LanguageEngine(double, "decode", silence=1.0)
        answer = engine.generate("left", [1], [], sampling="{}", cache_salt=None, kv=KV)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(answer), 0.01)

    asyncio.run(left_while_it_is_rendered())
    assert (double.given, double.rejected) == ([], ["r", "left"])


@pytest.mark.parametrize(
    ("prompt", "most", "reason", "told"),
    [
        ([1, 9, 2, 3], 16, "length", Delta([5], None, prompt_tokens=5, queue_seconds=0.0)),
        ([1, 9, 2, 3], 1, "length", Delta([5], "length", prompt_tokens=5, queue_seconds=0.0)),
        ([1, 9, 2, 3], None, "stop", Delta([5], "stop", prompt_tokens=5, queue_seconds=0.0)),
        ([1] * 63, None, "length", Delta([5], "length", prompt_tokens=63, queue_seconds=0.0)),
        ([1, 9, 2], 16, "length", None),
        ([1, 9, 2], 1, "length", Delta([5], "length", prompt_tokens=4, queue_seconds=0.0)),
    ],
    ids=[
        "goes on",
        "is all that was asked for",
        "ends",
        "fills the model",
        "begins a block",
        "is the last all the same",
    ],
)
def test_the_token_that_prefill_samples_is_the_answers_first(
    prompt: list[int], most: int | None, reason: str, told: Delta | None
) -> None:
    """Not where it would begin a block of the KV cache: the decode engine would look for that block here."""
    from vllm import SamplingParams

    double = EngineDouble()

    async def sampled(rendered: Any, params: Any, *_: Any, **__: Any) -> Any:
        assert (params.max_tokens, params.min_tokens, params.top_k) == (1, 1, 3)
        completion = SimpleNamespace(token_ids=[5], finish_reason=reason, stop_reason=None, logprobs=None)
        ids = rendered["prompt_token_ids"]
        yield SimpleNamespace(outputs=[completion], kv_transfer_params=KV, prompt_token_ids=ids, metrics=None)

    async def main() -> None:
        engine = LanguageEngine(double, "prefill", silence=1.0)
        sampling = encode_sampling(SamplingParams(top_k=3, max_tokens=most, min_tokens=1 if most == 1 else 6))
        assert (await engine.prefill("r", prompt, [], cache_salt=None, sampling=sampling)).first == told

    double.generate = sampled  # type: ignore[method-assign]
    asyncio.run(main())


def test_a_kv_cache_is_handed_over_with_its_time() -> None:
    double = EngineDouble()

    async def ended(*_: Any, **__: Any) -> Any:
        yield SimpleNamespace(kv_transfer_params=KV, prompt_token_ids=[1], metrics=None)

    async def main() -> None:
        engine = LanguageEngine(double, "prefill", silence=1.0)
        before = time.time()
        prefilled = await engine.prefill("r", [1], [], cache_salt=None)
        assert before < prefilled.until - lease.TAKE_OVER_SECONDS <= time.time()

    double.generate = ended  # type: ignore[method-assign]
    asyncio.run(main())


def test_who_stands_still_as_long_as_he_may_on_every_step_comes_before_the_lease_ends() -> None:
    assert lease.TAKE_OVER_SECONDS + 2 * lease.STILL_SECONDS < lease.KV_LEASE_SECONDS
    a_sixth, two_thirds = lease.KV_LEASE_SECONDS // 6, lease.KV_LEASE_SECONDS * 2 // 3  # vLLM's, in whole seconds
    assert two_thirds - a_sixth > lease.STILL_SECONDS
    given_up = worker_environment({}, {}, verbose=False)["DYN_NATS_REQUEST_TIMEOUT_SECS"]
    assert float(given_up) >= lease.TAKE_OVER_SECONDS


class Requests(FailOnPreemption):
    """The scheduler without vLLM's part of it: what was finished, and nothing scheduled."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.finished: list[str] = []
        self._lost, self._unpulled, self._pulls, self._being_pulled, self.goes_on = [], {}, {}, set(), False
        self.connector_output: Any = None

    def add(self, name: str, *, traced: bool = False, **params: Any) -> Any:
        request = SimpleNamespace(
            request_id=name,
            status=RequestStatus.WAITING,
            kv_transfer_params=params or None,
            arrival_time=time.time(),
            trace_headers={"traceparent": "00-1-1-01"} if traced else None,
        )
        self.add_request(request)
        return request

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        assert finished_status == RequestStatus.FINISHED_ERROR
        self.finished.append(request_ids)
        return [self.requests.pop(request_ids)]


def test_an_engine_that_stood_still_pulls_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, one: self.requests.update({one.request_id: one}))
    monkeypatch.setattr(AsyncScheduler, "schedule", lambda self, throttle: None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    scheduler = Requests()
    scheduler.add("plain")
    pulled = scheduler.add("pulled", do_remote_prefill=True)
    scheduler.add("waits", do_remote_prefill=True)
    on_its_way = scheduler.add("on its way", do_remote_prefill=True)
    for _ in range(3):  # longer in all, and it has turned meanwhile
        now += lease.STILL_SECONDS - 0.1
        scheduler.schedule()
    pulled.status, on_its_way.status = RequestStatus.RUNNING, RequestStatus.WAITING_FOR_REMOTE_KVS
    scheduler.schedule()
    assert scheduler.finished == []
    now += lease.STILL_SECONDS + 0.1
    scheduler.schedule()
    assert scheduler.finished == ["waits", "on its way"]
    assert [one.request_id for one in scheduler._lost] == scheduler.finished
    scheduler.add("came while it stood", do_remote_prefill=True)
    now += lease.STILL_SECONDS + 0.1
    scheduler.schedule()
    assert scheduler.finished[2:] == ["came while it stood"]
    assert not scheduler._unpulled


def test_an_engine_goes_on_where_a_pull_began_or_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, one: self.requests.update({one.request_id: one}))
    monkeypatch.setattr(AsyncScheduler, "update_from_output", lambda *_: {})
    begins: list[Any] = []

    def schedule(*_: Any) -> None:
        while begins:
            begins.pop().status = RequestStatus.WAITING_FOR_REMOTE_KVS

    monkeypatch.setattr(AsyncScheduler, "schedule", schedule)
    scheduler = Requests()
    one, other = (scheduler.add(name, do_remote_prefill=True) for name in ("one", "other"))

    def step(*pulled: Any, arrived: set[str] | None = None) -> bool:
        begins.extend(pulled)
        scheduler.schedule()
        heard = SimpleNamespace(kv_connector_output=SimpleNamespace(finished_recving=arrived))
        scheduler.update_from_output(SimpleNamespace(), heard)  # type: ignore[arg-type]
        return scheduler.goes_on

    assert not step()
    assert step(one)
    assert not step(), "on its way still: vLLM's loop rests between looks"
    assert step(other)
    assert step(arrived={"one"})
    one.status = RequestStatus.RUNNING
    assert not step()


def said(name: str, end: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput(name, [] if end == FinishReason.ERROR else [1], finish_reason=end)


def test_the_scheduler_tells_when_a_kv_cache_was_pulled_in_all_that_is_said_of_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, outputs = 100.0, [EngineCoreOutputs()]
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, one: self.requests.update({one.request_id: one}))
    monkeypatch.setattr(AsyncScheduler, "schedule", lambda self, throttle: None)
    monkeypatch.setattr(AsyncScheduler, "update_from_output", lambda *_: {0: outputs[0]})
    monkeypatch.setattr(time, "time", lambda: now)
    scheduler = Requests()
    names = ["comes", "fails", "is aborted", "fails later", "is not traced"]
    requests = [scheduler.add(name, traced="not" not in name, do_remote_prefill=True) for name in names]

    def step(arrived: set[str], *all_said: EngineCoreOutput) -> dict[str, Any]:
        nonlocal now
        now += 1.0
        outputs[0] = EngineCoreOutputs(outputs=list(all_said))
        heard = SimpleNamespace(kv_connector_output=SimpleNamespace(finished_recving=arrived or None))
        told = scheduler.update_from_output(SimpleNamespace(), heard)[0]  # type: ignore[arg-type]
        for name in arrived:
            scheduler.requests[name].status = RequestStatus.RUNNING
        for one in all_said:
            if one.finished:
                del scheduler.requests[one.request_id]
        scheduler.schedule()
        return {one.request_id: one.kv_transfer_params for one in told.outputs}

    scheduler.schedule()  # they wait for blocks
    for request in requests:
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    now = 101.0
    scheduler.schedule()
    del scheduler.requests["is aborted"]
    assert step(set()) == {}
    came, failed = {PULLED: [101.0, 103.0, True]}, {PULLED: [101.0, 103.0, False]}
    arrived = {"comes", "fails", "fails later", "is not traced"}
    assert step(arrived, said("fails", FinishReason.ERROR)) == {"fails": failed}
    assert step(set(), said("comes"), said("is not traced"), said("other")) == {
        "comes": came,
        "is not traced": None,
        "other": None,
    }
    assert step(set(), said("fails later", FinishReason.ERROR)) == {"fails later": came}, "preempted, say"
    assert step(set(), said("comes", FinishReason.STOP)) == {"comes": came}
    assert not scheduler._pulls


def test_of_a_pull_that_is_given_up_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(AsyncScheduler, "add_request", lambda self, one: self.requests.update({one.request_id: one}))
    monkeypatch.setattr(AsyncScheduler, "schedule", lambda self, throttle: None)
    monkeypatch.setattr(time, "time", lambda: now)
    scheduler = Requests()
    scheduler.add("on its way", traced=True, do_remote_prefill=True).status = RequestStatus.WAITING_FOR_REMOTE_KVS
    scheduler.schedule()
    assert scheduler._pulls
    now += lease.STILL_SECONDS + 0.1
    scheduler.schedule()
    assert scheduler.finished == ["on its way"]
    assert not scheduler._pulls


@pytest.mark.parametrize(("came", "failed"), [(True, None), (False, "hand_off_failed")])
def test_a_kv_cache_s_way_is_a_span_below_who_takes_it_over(here: Collector, came: bool, failed: str | None) -> None:
    double = EngineDouble()

    async def generate(*_: Any, **__: Any) -> Any:
        for reason in (None, "length" if came else "error"):  # the second says it again
            completion = CompletionOutput(0, "", [1], None, None, finish_reason=reason)
            told = {PULLED: [1_000.0, 1_000.5, came]}
            yield RequestOutput("r", None, [1, 2], None, [completion], reason is not None, kv_transfer_params=told)

    double.generate = generate  # type: ignore[method-assign]
    with suppress(Preempted), tracing.span("DecodeWorker.generate"):
        generated(double, kv=KV)
    way, whole = here.spans
    assert (way.name, way.parent, way.attributes["kv.engine"]) == ("nixl.read_kv", whole.id, "e")
    assert (way.began, way.ended) == (1_000_000_000_000, 1_000_500_000_000)
    assert (way.failed, way.attributes.get("error.type")) == (failed is not None, failed)


@pytest.mark.parametrize(
    "kv", [{}, {"do_remote_prefill": True}, {**KV, "remote_block_ids": []}, {**KV, "tp_size": "x"}]
)
def test_what_is_no_kv_cache_never_reaches_the_engine(kv: dict[str, Any]) -> None:
    double = EngineDouble()
    engine = LanguageEngine(double, "decode", silence=1.0)
    with pytest.raises(InvalidRequest):
        asyncio.run(engine.reject("r", kv))
    with pytest.raises(InvalidRequest):
        generated(double, kv=kv)
    assert (double.given, double.rejected) == ([], [])
    asyncio.run(engine.reject("r", KV))
    assert double.rejected == ["r"]


def test_a_grammar_that_waits_for_the_end_of_reasoning_needs_its_parser() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    double, schema = EngineDouble(), {"structured_outputs": StructuredOutputsParams(json={"type": "object"})}
    with pytest.raises(InternalError, match="reasoning-parser"):
        generated(double, schema, reasoning=Reasoning(False))
    assert double.given == []
    generated(double, schema, reasoning=Reasoning(True))
    double.vllm_config.structured_outputs_config.reasoning_parser = "qwen3"
    generated(double, schema, reasoning=Reasoning(False, {"thinking": True}))
    assert [one["reasoning_ended"] for one in double.given] == [True, False]
    assert double.given[1]["reasoning_parser_kwargs"] == {"chat_template_kwargs": {"thinking": True}}


def test_an_embedding_is_copied_out_of_the_arena() -> None:
    """vLLM sends it from where it lies, perhaps when its place is another's already."""
    lies = torch.zeros(4, 8)
    (given,) = multi_modal_data([ImageInput("u", lies)])
    lies.fill_(1.0)
    assert not given.any()


@pytest.mark.parametrize(
    "images",
    [
        [ImageInput("u", torch.zeros(4, 8)), ImageInput("v", torch.zeros(4, 9))],
        [ImageInput("u", torch.zeros(4, 8)), ImageInput("v", torch.zeros(4, 8, dtype=torch.bfloat16))],
        [ImageInput("u", torch.zeros(4, 4, 3, dtype=torch.uint8)), ImageInput("v", torch.zeros(4, 8))],
        [ImageInput("u", None, {"image_grid_thw": [1, 4, 4]}), ImageInput("v", None, {"image_sizes": [4, 4]})],
        [ImageInput("u", None, {"image_grid_thw": [1, 4, 4]}), ImageInput("v", None, {"image_grid_thw": [4, 4]})],
        [ImageInput("u", None, {"image_grid_thw": [1, 4, 4]}), ImageInput("v", torch.zeros(4, 8))],
    ],
    ids=["width", "dtype", "pixels", "names", "lengths", "some names"],
)
def test_images_that_do_not_go_together_are_refused(images: list[ImageInput]) -> None:
    with pytest.raises(InvalidRequest, match="does not go together"):
        multi_modal_data(images)


def test_pictures_of_any_size_go_together() -> None:
    sizes = [(4, 6), (8, 2)]
    pictures = [ImageInput("u", torch.zeros(height, width, 3, dtype=torch.uint8)) for width, height in sizes]
    assert [one.size for one in multi_modal_data(pictures)] == sizes


@pytest.mark.parametrize(
    "error", [ValueError("no"), VLLMValidationError("no"), AssertionError("no"), RuntimeError("no")], ids=repr
)
def test_a_prompt_without_a_place_for_its_image_is_the_clients_to_mend(error: Exception) -> None:
    double = EngineDouble()

    async def refuse(*_: Any) -> list[Any]:
        raise error

    double.renderer.render_cmpl_async = refuse
    engine = LanguageEngine(double, "both", silence=1.0)

    async def ask(images: list[ImageInput]) -> None:
        await engine._rendered([1], images, None, SimpleNamespace(), [])

    with pytest.raises(InvalidRequest, match="one place for each of its images"):
        asyncio.run(ask([ImageInput("u", torch.zeros(4, 8))]))
    with pytest.raises(type(error), match="no"):
        asyncio.run(ask([]))


def test_weights_are_safetensors_unless_the_operator_wants_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    class Enough(Exception):
        pass

    def arguments(*, load_format: str, **_: Any) -> None:
        given.append(load_format)
        raise Enough

    monkeypatch.setattr("vllm.engine.arg_utils.AsyncEngineArgs", arguments)
    for engine_args in ({}, {"load_format": "dummy"}):
        with pytest.raises(Enough):
            asyncio.run(LanguageEngine.start(engine_args, "both", 1.0))
    assert given == ["safetensors", "dummy"]


def test_an_engine_that_says_nothing_while_requests_wait_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    waiting = [0]
    monkeypatch.setattr(language.time, "monotonic", lambda: now[0])
    double = EngineDouble()
    vars(double).update(errored=False, output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: waiting[0]))
    engine = LanguageEngine(double, "decode", silence=60.0)
    now[0] += 61.0
    assert engine.alive, "nobody has asked it"
    waiting[0] = 1
    assert not engine.alive
    engine._heard = now[0]
    now[0] += 60.0
    assert engine.alive
    now[0] += 1.0
    assert not engine.alive
