# SPDX-License-Identifier: Apache-2.0
"""The processor: it conducts. Encode and tokenizing run at once, then prefill, then decode; nothing flows backwards.

One HTTP request is one `Conversation`: it holds what its answers have cost so far (leases, a KV cache, tokens already
streamed) and gives all of it back, however it ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec.structs import replace

from components.decode_worker import DecodeWorker
from components.embed_worker import EmbedWorker
from components.encode_worker import EncodeWorker
from components.giving_back import afterwards, give_back
from components.image_worker import ImageWorker
from components.prefill_worker import PrefillWorker
from components.protocol import (
    DecodeRequest,
    Delta,
    Encoded,
    EncodeRequest,
    HealthQuery,
    HttpReply,
    HttpRequest,
    ModelNames,
    ModelsQuery,
    Picture,
    PrefillReply,
    PrefillRequest,
    PromptImage,
    RejectRequest,
    ReleaseRequest,
    StageHealth,
    Validated,
    ValidateRequest,
    WithdrawRequest,
)
from components.validation import Validation, ValidationConfig
from dynamo_epd import tracing
from dynamo_epd.ending import end
from dynamo_epd.engine.language import decode_sampling, encode_sampling
from dynamo_epd.errors import EpdError, Preempted, Retryable, StageUnavailable, WorkerLost
from dynamo_epd.families import Family, family_of, refuse_typed_placeholders
from dynamo_epd.http.events import grouped
from dynamo_epd.prefix import BLOCK, blocks_of
from dynamo_epd.sdk import async_on_start, depends, dynamo_context, endpoint, service, service_config
from dynamo_epd.sdk.client import Call, Policy, ServiceClient

if TYPE_CHECKING:
    from dynamo_epd.engine.front import Answer, Prompt

REFERENCE = "image:"
"""What stands in an ``image_url`` part instead of the client's URL: this, and an index into the request's pictures."""

ENDED_WORKERS = 2
"""So many workers that go away over one request, and no other is given it."""

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Routing:
    """How a worker of each stage is chosen: ``affinity``, ``kv``, ``least-loaded`` or ``round-robin``."""

    encode: Policy = "affinity"
    """``affinity`` leads a picture to where its embedding is kept; ``least-loaded`` and ``round-robin`` do not."""
    prefill: Policy = "least-loaded"
    """``kv``: the worker with the least to prefill and in flight, by what it was sent before."""
    decode: Policy = "least-loaded"
    """As ``prefill``."""
    image: Policy = "least-loaded"
    """For validations."""
    embed: Policy = "least-loaded"
    """For validations."""


@dataclass(frozen=True)
class ProcessorConfig:
    """Keys of the ``Processor`` section beside vLLM's engine arguments."""

    served_model_name: str | list[str] | None = None
    """Names under which clients ask for the model; the first is the one in replies. Default: the model's own."""
    tool_call_parser: str | None = None
    """vLLM's parser of the model's tool calls (``hermes``, ``llama4_pythonic``, …). Default: none, and a request with
    tools is refused."""
    reasoning_parser: str | None = None
    """vLLM's parser of what a reasoning model says to itself. To be set for the DecodeWorker too, that a grammar may
    hold from the end of the reasoning on. Default: none."""
    chat_template: str | None = None
    """A Jinja template, or the path of one, in place of the checkpoint's."""
    attempts: int = 3
    """How often one answer is begun in vain at most: a lost worker or hand-off costs one."""
    prefill_threshold: int = 0
    """Prompts without images up to this many tokens are prefilled where they decode."""
    routing: Routing = field(default_factory=Routing)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    engine_args: dict[str, Any] = field(default_factory=dict)


@service(dynamo={"namespace": "dynamo"}, config=ProcessorConfig, engine_args=True)
class Processor:
    """OpenAI bodies in, OpenAI bodies and events out."""

    encode_worker = depends(EncodeWorker)
    prefill_worker = depends(PrefillWorker)
    decode_worker = depends(DecodeWorker)
    image_worker = depends(ImageWorker)
    embed_worker = depends(EmbedWorker)

    def __init__(self) -> None:
        self.config = service_config(ProcessorConfig)

    @async_on_start
    async def start(self) -> None:
        from dynamo_epd.engine.environment import prepare
        from dynamo_epd.metrics import Metrics

        prepare(self.config.engine_args)
        from dynamo_epd.engine.front import OpenAIFront

        model = self.config.engine_args["model"]
        self.front = await asyncio.to_thread(
            OpenAIFront,
            self.config.engine_args,
            ModelNames.of(self.config.served_model_name, model).names,
            tool_parser=self.config.tool_call_parser,
            reasoning_parser=self.config.reasoning_parser,
            chat_template=self.config.chat_template,
        )
        self.family: Family = family_of(self.front.architectures)
        await self.front.warm_up()
        self.metrics = Metrics(dynamo_context["namespace"], "Processor", model).tokens()
        for stage, policy in (
            (self.encode_worker, self.config.routing.encode),
            (self.prefill_worker, self.config.routing.prefill),
            (self.decode_worker, self.config.routing.decode),
            (self.image_worker, self.config.routing.image),
            (self.embed_worker, self.config.routing.embed),
        ):
            stage.route(policy)
        self.placeholder_ids = self.front.ids_of(self.family.placeholders)

    @endpoint()
    async def chat(self, request: HttpRequest) -> AsyncIterator[HttpReply]:
        """Answers ``POST /v1/chat/completions``."""
        tracing.generation("chat", request.body)
        refuse_typed_placeholders(self.family, texts_of(request.body))
        async with Conversation(self, request) as conversation:
            answer = await self.front.chat(request.body, conversation.answer, conversation.until)
            async for reply in replies(answer):
                yield reply

    @endpoint()
    async def complete(self, request: HttpRequest) -> AsyncIterator[HttpReply]:
        """Answers ``POST /v1/completions``."""
        tracing.generation("text_completion", request.body)
        refuse_typed_placeholders(self.family, texts_of(request.body))
        self.front.refuse_token_ids(self.family.placeholders, request.body.get("prompt"))
        async with Conversation(self, request) as conversation:
            answer = await self.front.complete(request.body, conversation.answer, conversation.until)
            async for reply in replies(answer):
                yield reply

    @endpoint()
    async def validate(self, request: ValidateRequest) -> AsyncIterator[Validated]:
        """Answers ``POST /v1/validations``: each stage's result as it comes."""
        async with aclosing(Validation(self, request).results()) as results:
            async for result in results:
                yield result

    async def answered(self, request: HttpRequest) -> tuple[str, float]:
        """The JSON body of a chat's whole reply, and the seconds that it waited in the stages' queues."""
        with tracing.span("chat"):  # there may be several below the one span of who asks
            tracing.generation("chat", request.body)
            async with Conversation(self, request) as conversation:
                answer = await self.front.chat(request.body, conversation.answer, conversation.until)
        assert answer.body is not None
        return answer.body, conversation.queue_seconds

    @property
    def conditioned(self) -> bool:
        """Whether embed workers condition this graph's pictures."""
        edges = dynamo_context["graph"].edges
        return any(service is ImageWorker and name == "embed_worker" for service, name in edges)

    @endpoint()
    async def models(self, query: ModelsQuery) -> AsyncIterator[HttpReply]:
        """Answers ``GET /v1/models``."""
        yield HttpReply(status=200, body=await self.front.models())

    @endpoint()
    async def health(self, query: HealthQuery) -> AsyncIterator[StageHealth]:
        """Live workers of every stage that this graph links."""
        linked = [stage for stage in (self.encode_worker, self.prefill_worker, self.decode_worker) if stage]
        yield StageHealth({stage.name: len(stage.instances()) for stage in linked})

    def blocks_of(
        self, stage: ServiceClient, token_ids: list[int], images: list[Leased], tenant: str
    ) -> Sequence[bytes]:
        """What ``stage`` goes by where it is routed by its workers' KV caches."""
        if stage.policy != "kv":
            return ()
        known = [
            (leased.encoded.uuid, leased.encoded.handle.shape[0] if self.family.hand_off == "embedding" else BLOCK)
            for leased in images
        ]
        return blocks_of(token_ids, known, self.placeholder_ids, tenant_salt(tenant))

    def prefills_apart(self, token_ids: list[int], images: list[Leased]) -> bool:
        """Whether this prompt goes through a prefill worker: there is one, and the prompt is worth the hand-off."""
        return bool(self.prefill_worker) and (bool(images) or len(token_ids) > self.config.prefill_threshold)

    def take_over(self, request: DecodeRequest, images: list[Leased], prefilled: PrefillReply) -> DecodeRequest:
        """The same request for a decode worker that takes the prompt's KV cache over.

        Where it gets no image at all, two images under the same text would share KV in its prefix cache: their
        identities then go into the salt.
        """
        if images and self.family.decode_reads == "metadata":
            known = [PromptImage(leased.encoded.uuid, None, leased.encoded.metadata) for leased in images]
            return replace(request, images=known, kv=prefilled.kv, kv_until=prefilled.kv_until)
        salt = request.cache_salt
        if images:
            salt = hashed(salt or "", *(leased.encoded.uuid for leased in images))
        return replace(
            request,
            token_ids=prefilled.token_ids,
            streamed=[],
            images=[],
            cache_salt=salt,
            kv=prefilled.kv,
            kv_until=prefilled.kv_until,
        )


@dataclass(frozen=True)
class Leased:
    """An embedding that an encode worker keeps for one READ."""

    encoded: Encoded
    worker: int


class Conversation:
    """One HTTP request while it runs. Its pictures begin to be encoded on entry, while the prompt is rendered."""

    def __init__(self, processor: Processor, request: HttpRequest):
        self._processor = processor
        self._request = request
        self._arrived = time.perf_counter()
        self.until = asyncio.get_running_loop().time() + request.deadline - time.time()
        self._ahead: dict[int, asyncio.Task[Leased]] = {}
        self._ended: set[int] = set()
        self._read = self._written = 0
        self.queue_seconds = 0.0
        """In the queues of all stages; of pictures encoded side by side the longest counts."""

    async def __aenter__(self) -> Conversation:
        for index, picture in enumerate(self._request.pictures):
            self._ahead[index] = asyncio.create_task(self._encode(picture))
        await asyncio.sleep(0)  # each is asked for before the prompt takes this process' time
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._read:  # a reply that came to its end has said it, by what vLLM counts
            tracing.usage(self._read, self._written)
        # Encoded ahead and wanted by no prompt: the request was refused while it was rendered.
        afterwards(self._release_unwanted(list(self._ahead.values())))

    async def answer(self, prompt: Prompt) -> AsyncGenerator[Delta, None]:
        """The deltas of one answer; begun again elsewhere where a worker or hand-off is lost.

        Tokens that were already streamed are then part of the prompt, so that the stream simply goes on.

        Raises:
            StageUnavailable: nobody is left to ask, or this request has had its attempts.
            EpdError: any refusal of a stage (a picture that cannot be fetched, a prompt too long).
        """
        streamed: list[int] = []
        metrics = self._processor.metrics
        last = self._arrived
        lost: EpdError | None = None
        fruitless = 0
        for attempt in itertools.count():
            if lost is not None and streamed and not resumable(prompt.sampling):
                break
            try:
                async with aclosing(self._attempt(prompt, attempt, streamed)) as deltas:
                    async for delta in deltas:
                        now = time.perf_counter()
                        (metrics.inter_token if streamed else metrics.first_token).observe(now - last)
                        last = now
                        streamed += delta.token_ids
                        self._read = self._read or delta.prompt_tokens or 0
                        self._written += len(delta.token_ids)
                        yield delta
                return
            except Retryable as error:
                lost = error
                log.info("%s attempt %d: %s", prompt.request_id, attempt + 1, error.message)
                # An engine short of KV blocks may preempt the same answer often, but each time it got further.
                fruitless += not isinstance(error, Preempted)
                if fruitless >= self._processor.config.attempts:
                    break
        assert lost is not None
        raise StageUnavailable(f"{lost.message}; the request can be sent again") from lost

    async def _attempt(self, prompt: Prompt, attempt: int, streamed: list[int]) -> AsyncGenerator[Delta, None]:
        """Encode → prefill → decode, once. ``streamed`` is the beginning of the answer, if there is one already, and
        grows by what is yielded. Raises Preempted only where decode has got further."""
        processor = self._processor
        begun = len(streamed)
        request_id = f"{prompt.request_id}.{attempt}"
        token_ids = prompt.token_ids + streamed
        images = await self._images(prompt)
        unread = images
        kv: dict[str, Any] | None = None
        asked: Call | None = None
        ahead: asyncio.Future[Delta | None] | None = None
        first: Delta | None = None
        decode = DecodeRequest(
            request_id,
            prompt.token_ids,
            [prompt_image(leased) for leased in images],
            continued(prompt.sampling, len(streamed)),
            tenant_salt(self._request.tenant),
            streamed.copy(),
            prompt.reasoning,
        )
        try:
            if processor.prefills_apart(token_ids, images):
                blocks = processor.blocks_of(processor.prefill_worker, token_ids, images, self._request.tenant)
                prefilled = await self._prefill(decode, blocks)
                unread, kv = [], prefilled.kv
                self.queue_seconds += prefilled.queue_seconds
                decode = processor.take_over(decode, images, prefilled)
                if (first := prefilled.first) is not None:
                    begun += len(first.token_ids)
                    if streamed:
                        first = replace(first, prompt_tokens=None)
                    if first.finish_reason is not None:
                        yield first
                        return
                    sampling = continued(decode.sampling, len(first.token_ids))
                    decode = replace(decode, streamed=decode.streamed + first.token_ids, sampling=sampling)
            blocks = processor.blocks_of(processor.decode_worker, token_ids, images, self._request.tenant)
            asked = call = processor.decode_worker.generate(decode, blocks=blocks)
            async with aclosing(call):
                opening: Awaitable[Delta | None] = anext(call, None)
                if first is not None:
                    opening = ahead = asyncio.ensure_future(opening)
                    await asyncio.sleep(0)  # decode is asked before the first token takes this process' time
                    yield first
                with self._suspected(call):
                    delta = await opening
                while delta is not None:
                    unread, kv = [], None
                    self.queue_seconds += delta.queue_seconds or 0.0
                    if streamed and delta.prompt_tokens is not None:
                        delta = replace(delta, prompt_tokens=None)
                    yield delta
                    delta = await anext(call, None)
        except Preempted as error:
            if len(streamed) > begun:
                raise
            raise Retryable(error.message) from error
        finally:
            if ahead is not None:
                await end(ahead)
            self._release(unread)
            if kv is not None:
                afterwards(self._reject(request_id, kv, None if asked is None else asked.instance))

    async def _images(self, prompt: Prompt) -> list[Leased]:
        """The prompt's embeddings, in its order; those encoded ahead go to the first prompt that asks."""
        tasks = []
        for reference in prompt.images:
            index = int(reference.removeprefix(REFERENCE))
            ahead = self._ahead.pop(index, None)
            tasks.append(ahead or asyncio.create_task(self._encode(self._request.pictures[index])))
        try:
            images = await asyncio.gather(*map(asyncio.shield, tasks))
        except BaseException:
            afterwards(self._release_unwanted(tasks))
            raise
        self.queue_seconds += max((leased.encoded.queue_seconds for leased in images), default=0.0)
        return images

    async def _encode(self, picture: Picture) -> Leased:
        try:
            return await self._encode_once(picture)
        except WorkerLost:
            # Nothing was handed on yet: asking another worker costs the answer none of its attempts.
            return await self._encode_once(picture)

    async def _encode_once(self, picture: Picture) -> Leased:
        request_id = f"{self._request.request_id}.{secrets.token_hex(4)}"
        call = self._processor.encode_worker.encode(
            EncodeRequest(request_id, self._request.tenant, picture), key=picture.key
        )
        try:
            with self._suspected(call):
                return Leased(await call.only(), call.instance)
        except asyncio.CancelledError:
            if call.instance is not None:
                release = ReleaseRequest(request_ids=[request_id])
                afterwards(give_back(self._processor.encode_worker.release(release, instance=call.instance)))
            raise

    async def _prefill(self, decode: DecodeRequest, blocks: Sequence[bytes]) -> PrefillReply:
        sampling = decode.sampling if resumable(decode.sampling) else None
        request = PrefillRequest(
            decode.request_id, decode.token_ids, decode.images, decode.cache_salt, decode.streamed, sampling
        )
        call = self._processor.prefill_worker.prefill(request, blocks=blocks)
        try:
            with self._suspected(call):
                prefilled: PrefillReply = await call.only()
        except asyncio.CancelledError:
            if call.instance is not None:
                afterwards(self._withdraw(request.request_id, call.instance))
            raise
        return prefilled

    @contextmanager
    def _suspected(self, call: Call) -> Iterator[None]:
        """Counts a worker that went away before it had answered. Raises StageUnavailable for the second one: this
        request may be what ends them, and a third is not given to it."""
        try:
            yield
        except WorkerLost as error:
            if call.taken and call.instance is not None:
                self._ended.add(call.instance)
            if len(self._ended) >= ENDED_WORKERS:
                raise StageUnavailable(f"{error.message}, and so did one before it: the request is given up") from error
            raise

    def _release(self, unread: list[Leased]) -> None:
        by_worker: dict[int, list[str]] = {}
        for leased in unread:
            by_worker.setdefault(leased.worker, []).append(leased.encoded.handle.lease)
        for worker, leases in by_worker.items():
            afterwards(give_back(self._processor.encode_worker.release(ReleaseRequest(leases), instance=worker)))

    async def _release_unwanted(self, tasks: list[asyncio.Task[Leased]]) -> None:
        self._release(await withdrawn(tasks))

    async def _withdraw(self, request_id: str, worker: int) -> None:
        lost = await give_back(self._processor.prefill_worker.withdraw(WithdrawRequest(request_id), instance=worker))
        if lost is not None and lost.kv is not None:
            await self._reject(request_id, lost.kv)

    async def _reject(self, request_id: str, kv: dict[str, Any], asked: int | None = None) -> None:
        """By the decode worker that was asked: it knows whether it may still pull. Where it is lost the lease ends."""
        await give_back(self._processor.decode_worker.reject(RejectRequest(request_id, kv), instance=asked))


async def withdrawn(tasks: Sequence[asyncio.Task[Result]]) -> list[Result]:
    """Cancels those that still run, and returns what the others gave."""
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result for result in results if not isinstance(result, BaseException)]


async def replies(answer: Answer) -> AsyncIterator[HttpReply]:
    """The status with the body or the first events, then what follows."""
    if answer.events is None:
        yield HttpReply(status=answer.status, body=answer.body)
        return
    status: int | None = answer.status
    async with aclosing(grouped(answer.events)) as groups:
        async for events in groups:
            yield HttpReply(status=status, event=events)
            status = None


def prompt_image(leased: Leased) -> PromptImage:
    return PromptImage(leased.encoded.uuid, leased.encoded.handle, leased.encoded.metadata)


def texts_of(body: dict[str, Any]) -> list[str]:
    """Every text of a checked body that a template may put into the prompt."""
    prompt = body.get("prompt", [])
    texts = [prompt] if isinstance(prompt, str) else [one for one in prompt if isinstance(one, str)]
    for message in body.get("messages", []):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content or ""}]
        texts += [part.get("text") or "" for part in parts]
        texts.append(message.get("name") or "")
    return texts


def tenant_salt(tenant: str) -> str | None:
    """Prefix caches are a tenant's own. None where there is only one."""
    return hashed("tenant", tenant) if tenant else None


def hashed(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def resumable(sampling: str) -> bool:
    """Whether an answer can go on with its beginning moved into the prompt: its distribution must not depend on where
    the answer began. Penalties count output tokens, a grammar and a seeded generator have a state."""
    params = json.loads(sampling)
    return (
        not params.get("structured_outputs")
        and params.get("presence_penalty", 0.0) == 0.0
        and params.get("frequency_penalty", 0.0) == 0.0
        and (params.get("seed") is None or params.get("temperature", 1.0) == 0.0)
    )


def continued(sampling: str, streamed: int) -> str:
    """The sampling parameters of the rest of an answer of which ``streamed`` tokens are there."""
    if not streamed:
        return sampling
    params = decode_sampling(sampling)  # the text leaves defaults out, and one is of `max_tokens`
    if params.max_tokens is not None:
        params.max_tokens = max(1, params.max_tokens - streamed)
    params.min_tokens = max(0, params.min_tokens - streamed)
    return encode_sampling(params)
