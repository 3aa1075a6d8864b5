# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI layer without an engine behind it.

Chat templates, tokenizing, sampling parameters, tool and JSON-schema handling, detokenizing, stop strings, log
probabilities and the shape of every chunk are vLLM's own. What is ours is where the tokens come from: `OpenAIFront`
hands each prompt to a ``conduct`` function and feeds the `Delta`s that it yields into vLLM's output processor. No
weights, no image and no engine process are loaded here; pictures stay references.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError
from msgspec import Struct
from msgspec.json import Decoder
from msgspec.structs import replace
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GenerationError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.outputs import RequestOutput
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from dynamo_epd import tracing
from dynamo_epd.engine.delta import Delta, Reasoning, TokenLogprobs
from dynamo_epd.engine.language import encode_sampling
from dynamo_epd.errors import DeadlineExceeded, EpdError, InternalError, InvalidRequest, ModelNotFound

_DONE = "data: [DONE]\n\n"
"""After the last event."""

_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.REPETITION}


@dataclass(frozen=True)
class Prompt:
    """One answer to be produced: ``n`` answers to a chat are ``n`` prompts."""

    request_id: str
    token_ids: list[int]
    """One placeholder an image, not yet expanded."""
    images: list[str]
    """References, in prompt order, as they stood in the body's ``image_url`` parts."""
    sampling: str
    """`dynamo_epd.engine.language.encode_sampling`'s text."""
    reasoning: Reasoning | None = None
    """None where there is no reasoning, or no parser of it."""


Conduct = Callable[[Prompt], AsyncGenerator[Delta, None]]


@dataclass(frozen=True)
class Answer:
    """The reply to one HTTP request: a status, and either one body or a stream of server-sent events."""

    status: int
    body: str | None
    events: AsyncGenerator[str, None] | None = None


class OpenAIFront:
    """Chat and completions for one model.

    Args:
        engine_args: vLLM engine arguments by name; the same as the engines', so that limits agree.
        served_names: names under which clients may ask for the model; the first is the one in replies.
        tool_parser, reasoning_parser, chat_template: as for ``vllm serve``.
    """

    def __init__(
        self,
        engine_args: Mapping[str, Any],
        served_names: list[str],
        *,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        chat_template: str | None = None,
    ):
        os.environ["VLLM_MEDIA_CONNECTOR"] = _References.name
        self._engine = _ConductedEngine(engine_args)  # type: ignore[abstract]
        config = self._engine.model_config
        models = OpenAIServingModels(
            self._engine, [BaseModelPath(name=name, model_path=config.model) for name in served_names]
        )
        renderer = OnlineRenderer(
            config,
            self._engine.renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            enable_auto_tools=tool_parser is not None,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        self._models = models
        self._chat = OpenAIServingChat(
            self._engine,
            models,
            "assistant",
            online_renderer=renderer,
            request_logger=None,
            chat_template=chat_template,
            chat_template_content_format="auto",
            enable_auto_tools=tool_parser is not None,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser or "",
        )
        self._completion = OpenAIServingCompletion(self._engine, models, online_renderer=renderer, request_logger=None)

    @property
    def architectures(self) -> list[str]:
        """As in the checkpoint's ``config.json``."""
        return list(self._engine.model_config.architectures)

    def ids_of(self, tokens: tuple[str, ...]) -> tuple[int, ...]:
        """Of those that the tokenizer knows as one token."""
        tokenizer = self._engine.renderer.tokenizer
        ids = tokenizer.convert_tokens_to_ids(list(tokens))
        return tuple(one for one in ids if one not in (None, getattr(tokenizer, "unk_token_id", None)))

    def refuse_token_ids(self, reserved: tuple[str, ...], prompt: Any) -> None:
        """Raises InvalidRequest where a prompt given as token ids holds a token of ``reserved``."""
        ids = set(self.ids_of(reserved))
        rows = prompt if isinstance(prompt, list) else []
        for row in rows if rows and isinstance(rows[0], list) else [rows]:
            if ids.intersection(token for token in row if isinstance(token, int)):
                raise InvalidRequest("the prompt holds a token that stands for an image", param="prompt")

    async def warm_up(self) -> None:
        """Compiles the chat template and loads the tokenizer's tables, so that the first request is not slow."""
        await asyncio.to_thread(self._chat.online_renderer.warmup)

    async def models(self) -> str:
        """The body of ``GET /v1/models``."""
        return str((await self._models.show_available_models()).model_dump_json())

    async def chat(self, body: dict[str, Any], conduct: Conduct, until: float | None = None) -> Answer:
        """Answers one chat request. ``image_url`` parts hold references that ``conduct`` understands. What is not there
        at ``until``, by the event loop's clock, is DeadlineExceeded.

        Raises:
            EpdError: before the first byte of the reply. Afterwards the stream of events raises it. Anything else is a
                defect: what vLLM refuses it says by classes of its own, or it is `_define_one_name_twice`.
        """
        return await self._answer(ChatCompletionRequest, self._chat.create_chat_completion, body, _Run(conduct, until))

    async def complete(self, body: dict[str, Any], conduct: Conduct, until: float | None = None) -> Answer:
        """Answers one (text-only) completion request. Raises like `chat`."""
        run = _Run(conduct, until)
        return await self._answer(CompletionRequest, self._completion.create_completion, body, run)

    async def _answer(self, kind: Any, create: Any, body: dict[str, Any], run: _Run) -> Answer:
        token = _current.set(run)
        streaming = False
        try:
            result = await create(kind.model_validate(_greedy_many(body)))
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # which vLLM turns into an answer
                raise asyncio.CancelledError
            if isinstance(result, ErrorResponse):
                raise _refusal(result)
            if not isinstance(result, AsyncGenerator):
                run.note(result)
                return Answer(200, result.model_dump_json())
            # The stages are asked only when the stream is first read, and a refusal then still has an HTTP status.
            events = _events(run, result)
            first = await anext(events)
            streaming = True
            return Answer(200, None, _resume(first, events))
        except GenerationError as error:
            raise run.failure or InternalError("The answer could not be completed.") from error
        except (VLLMClientError, ValidationError) as error:
            raise _invalid(error) from error
        except ValueError as error:
            if not _define_one_name_twice(body):
                raise
            raise InvalidRequest(
                "two of 'tools' define one name in their '$defs' in two ways", param="tools"
            ) from error
        finally:
            _current.reset(token)
            if not streaming:
                await run.close()


def _define_one_name_twice(body: dict[str, Any]) -> bool:
    """Whether a call of one of the tools is required of which two have a name in their ``$defs`` for two things.

    Most of vLLM's tool parsers then need one schema for all tools together, and refuse it as Python refuses a value
    (``vllm/tool_parsers/utils.py``, 0.31). The others take it: so this says what was refused, and refuses nothing.
    """
    found: dict[str, Any] = {}
    for tool in body.get("tools") or () if body.get("tool_choice") == "required" else ():
        for name, schema in (tool["function"].get("parameters") or {}).get("$defs", {}).items():
            if found.setdefault(name, schema) != schema:
                return True
    return False


def _greedy_many(body: dict[str, Any]) -> dict[str, Any]:
    """``n`` greedy answers, which OpenAI's API gives and vLLM refuses, said so that vLLM takes them.

    The likeliest token is also the only one of the top one. Log probabilities are those before temperature: the same.
    """
    if (body.get("n") or 1) > 1 and body.get("temperature") == 0:
        return body | {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0}
    return body


class _Choice(Struct):
    index: int
    finish_reason: str | None = None


class _Chunk(Struct):
    """What an event of a stream says of the reply."""

    id: str
    model: str
    choices: list[_Choice]


_CHUNK = Decoder(_Chunk)


@dataclass
class _Run:
    """What belongs to one HTTP request while vLLM's layer, which knows nothing of it, works on it."""

    conduct: Conduct
    until: float | None = None
    failure: EpdError | None = None
    outputs: list[AsyncGenerator[RequestOutput, None]] = field(default_factory=list)
    reply: Any = None
    """The body or, of a stream, the last event that was read."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    """By answer."""
    read: int = 0
    written: int = 0
    """Tokens as vLLM counts them in ``usage``, which not every stream ends with."""

    def note(self, reply: Any) -> None:
        """Looks at a body or a `_Chunk`, for the request's span."""
        self.reply = reply
        self.finish_reasons |= {one.index: one.finish_reason for one in reply.choices if one.finish_reason is not None}

    async def close(self) -> None:
        """Ends what produces tokens, and tells of the reply what there was of it. vLLM's own generators, when closed,
        leave that to the garbage collector."""
        await self._end()
        if self.reply is not None:
            reasons = [reason for _, reason in sorted(self.finish_reasons.items())]
            tracing.response(self.reply.model, self.reply.id, reasons)
        if self.read:
            tracing.usage(self.read, self.written)

    async def _end(self) -> None:
        for outputs in self.outputs:
            with suppress(RuntimeError):  # of several prompts one failed: the others' are just being cancelled by vLLM
                await outputs.aclose()


_current: ContextVar[_Run] = ContextVar("run")


async def _events(run: _Run, stream: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """vLLM's events, except that its error event is raised as the error behind it and nothing follows it."""
    try:
        async for event in stream:
            if event.startswith('data: {"error"'):
                raise run.failure or InternalError("The answer could not be completed.")
            if tracing.ON and event != _DONE:
                run.note(_CHUNK.decode(event.removeprefix("data: ")))
            yield event
    finally:
        await stream.aclose()
        await run.close()


async def _resume(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()


@asynccontextmanager
async def _before(until: float | None) -> AsyncIterator[None]:
    """Raises DeadlineExceeded in what it holds, once that time of the event loop's clock has come."""
    limit = asyncio.timeout_at(until)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("the request's time is up") from error


def _refusal(response: ErrorResponse) -> EpdError:
    error = response.error
    if error.code == 404:  # vLLM's text repeats the name, which may be anything
        return ModelNotFound("there is no such chat model here", param="model")
    kind = InvalidRequest if error.code < 500 else InternalError
    return kind(error.message, param=error.param)


def _invalid(error: VLLMClientError | ValidationError) -> InvalidRequest:
    """The first complaint, with the field it is about, and without the value that the client sent."""
    if isinstance(error, VLLMClientError):
        return InvalidRequest(_own_words(error), param=getattr(error, "parameter", None))
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(step) for step in first["loc"] if not str(step).startswith("Chat"))
    return InvalidRequest(f"{where}: {first['msg']}" if where else str(first["msg"]), param=where or None)


def _own_words(error: VLLMClientError) -> str:
    """What vLLM itself says. Its ``str`` adds the client's value, and other libraries quote what they cannot read."""
    said = str(error.args[0]) if error.args else "the request is not valid"
    if "grammar" in said.lower():
        return "the schema cannot be made into a grammar"
    if error.__cause__ is not None and not isinstance(error.__cause__, TemplateError):
        return "the request cannot be rendered"
    return said


@MEDIA_CONNECTOR_REGISTRY.register("reference")
class _References(MediaConnector):
    """Loads nothing: the picture of a part is its reference, for the encode stage to resolve."""

    name = "reference"

    def fetch_image(self, image_url: str, **_: Any) -> Any:
        return image_url

    async def fetch_image_async(self, image_url: str, **_: Any) -> Any:
        return image_url


def _renderer_without_images(config: VllmConfig) -> Any:
    """The model's renderer, except that images stay references and placeholders stay single."""
    renderer = renderer_from_config(config)

    class References(type(renderer)):  # type: ignore[misc]
        def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
            rendered = tokens_input(
                prompt["prompt_token_ids"], prompt=prompt.get("prompt"), cache_salt=prompt.get("cache_salt")
            )
            rendered["images"] = list((prompt.get("multi_modal_data") or {}).get("image", ()))
            return rendered

        async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
            return self._process_tokens(prompt)

        def warmup_mm(self) -> None:
            """There is no image to warm up with."""

    renderer.__class__ = References
    return renderer


class _ConductedEngine(EngineClient):
    """What vLLM's serving classes take for their engine."""

    def __init__(self, engine_args: Mapping[str, Any]):
        self.model_config = AsyncEngineArgs(**{**engine_args, "mm_processor_cache_gb": 0}).create_model_config()
        # Weights are never loaded here; a quantised checkpoint would ask for kernels of a device we may not have.
        self.model_config.quantization = None
        self.vllm_config = VllmConfig(model_config=self.model_config)
        self.renderer = _renderer_without_images(self.vllm_config)
        self.input_processor = InputProcessor(self.vllm_config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """A plain function that returns a generator: bad parameters are refused before the stream begins."""
        reasoning = None
        if reasoning_ended or reasoning_parser_kwargs is not None:
            template = (reasoning_parser_kwargs or {}).get("chat_template_kwargs")
            reasoning = Reasoning(bool(reasoning_ended), template or {})
        request = self.input_processor.process_inputs(request_id, prompt, sampling_params, ("generate",))
        self.input_processor.assign_request_id(request)
        run = _current.get()
        outputs = self._stream(run, request, prompt.get("images", []), prompt.get("prompt"), reasoning)
        run.outputs.append(outputs)
        return outputs

    async def _stream(
        self,
        run: _Run,
        request: EngineCoreRequest,
        images: list[str],
        text: str | None,
        reasoning: Reasoning | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        params = request.params
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        answers = []
        for answer, parent, index in _fan_out(request):
            self.output_processor.add_request(answer, text, parent, index, queue)
            answers.append(answer)
        prompts = [
            Prompt(answer.request_id, answer.prompt_token_ids, images, encode_sampling(answer.params), reasoning)
            for answer in answers
        ]
        tasks = [
            asyncio.create_task(self._feed(run, answer, prompt, queue))
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        try:
            finished, read = False, 0
            while not finished:
                output = queue.get_nowait() or await queue.get()
                finished = output.finished
                run.read += len(output.prompt_token_ids) - read
                read = len(output.prompt_token_ids)
                run.written += sum(len(one.token_ids) for one in output.outputs)  # those since the output before
                yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.output_processor.abort_requests([request.request_id], internal=True)
            queue.close()

    async def _feed(self, run: _Run, request: EngineCoreRequest, prompt: Prompt, queue: RequestOutputCollector) -> None:
        """Brings one answer's deltas to the output processor, until either side says that it is done."""
        deltas = run.conduct(prompt)
        try:
            async with _before(run.until):  # around all deltas: a timeout for each costs as much as the delta
                async for delta in deltas:
                    if self._take(request, delta):
                        return
                raise InternalError("The answer ended before its end.")
        except EpdError as error:
            run.failure = error
            queue.put(GenerationError(error.message))
        except Exception:  # the boundary: vLLM's layer would tell the client the text of any exception
            logging.getLogger(__name__).exception("request %s failed", request.request_id)
            run.failure = InternalError("The answer could not be completed.")
            queue.put(GenerationError(run.failure.message))
        finally:
            await deltas.aclose()

    def _take(self, request: EngineCoreRequest, delta: Delta) -> bool:
        """Whether the answer needs no further one."""
        state = self.output_processor.request_states.get(request.request_id)
        if state is None:
            return True
        if delta.prompt_tokens is not None:
            # Usage counts the image tokens. A reasoning parser looks at the ids, at how they end.
            ids = request.prompt_token_ids
            state.prompt_token_ids = [0] * (delta.prompt_tokens - len(ids)) + ids
            state.prompt_len = delta.prompt_tokens
        # A stop string ends an answer at a token, and what was said after it is not the answer's.
        for one in _single(delta) if request.sampling_params.stop else (delta,):
            processed = self.output_processor.process_outputs([_core_output(request.request_id, one)])
            if one.finish_reason is not None or processed.reqs_to_abort:
                return True
        return False

    async def abort(self, request_id: Any) -> None:
        self.output_processor.abort_requests(
            [request_id] if isinstance(request_id, str) else request_id, internal=False
        )

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def is_tracing_enabled(self) -> bool:
        return False

    async def check_health(self) -> None:
        """Always well: the stages' health is the graph's own business."""

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        return InternalError("there is no engine here to die")


# The rest of vLLM's abstract interface steers an engine (sleep, profiles, adapters, pauses). Nothing here has one, and
# a call that reaches it is a defect.
_ConductedEngine.__abstractmethods__ = frozenset()


def _fan_out(request: EngineCoreRequest) -> list[tuple[EngineCoreRequest, ParentRequest | None, int]]:
    """One request an answer: ``n`` answers share a prompt, and differ in their seed where one is given."""
    if request.params.n == 1:
        return [(request, None, 0)]
    parent = ParentRequest(request)
    answers = []
    for index in range(request.params.n):
        answer = copy(request)
        answer.request_id, answer.sampling_params = parent.get_child_info(index)
        answers.append((answer, parent, index))
    return answers


def _single(delta: Delta) -> Iterator[Delta]:
    """A delta's tokens one by one; the last has how it ends."""
    for index, token in enumerate(delta.token_ids[:-1]):
        yield Delta([token], logprobs=delta.logprobs and delta.logprobs[index : index + 1])
    yield replace(delta, token_ids=delta.token_ids[-1:], logprobs=delta.logprobs and delta.logprobs[-1:])


def _core_output(request_id: str, delta: Delta) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=delta.token_ids,
        new_logprobs=_logprobs_lists(delta.logprobs) if delta.logprobs else None,
        finish_reason=_FINISH[delta.finish_reason] if delta.finish_reason is not None else None,
        stop_reason=delta.stop_reason,
    )


def _logprobs_lists(positions: list[TokenLogprobs]) -> LogprobsLists:
    """Rows of equal width, as vLLM wants them.

    A sampled token that is also among the most likely stands once in a `TokenLogprobs` and twice in vLLM's row, so
    shorter rows are filled with the sampled token again.
    """
    width = max(len(position.token_ids) for position in positions)
    ids = np.array([p.token_ids + p.token_ids[:1] * (width - len(p.token_ids)) for p in positions], dtype=np.int32)
    values = np.array([p.logprobs + p.logprobs[:1] * (width - len(p.logprobs)) for p in positions], dtype=np.float32)
    return LogprobsLists(ids, values, np.array([p.rank for p in positions], dtype=np.int32))
