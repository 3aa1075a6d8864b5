# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine as a stage uses it: prefill and hand over the KV cache, take it over and decode, or both in one.

Which of them an engine can do is its ``kv_role``; the calls are the same. Prompts are token ids with one placeholder an
image (vLLM expands them) or, where the KV cache is taken over, the expanded ids that prefill returned. The beginning of
an answer that goes on is told apart from them: for some models vLLM turns a prompt with images into text and back, and
would make other tokens of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
import psutil
from msgspec.structs import replace

from dynamo_epd import dropped, tracing
from dynamo_epd.engine.delta import Delta, Reasoning, TokenLogprobs
from dynamo_epd.engine.environment import DELTA_SECONDS
from dynamo_epd.engine.lease import KV_LEASE_SECONDS, PULLED, STILL_SECONDS, TAKE_OVER_SECONDS
from dynamo_epd.errors import HandOffFailed, InternalError, InvalidRequest, Preempted, Retryable, WorkerLost
from dynamo_epd.given import Given
from dynamo_epd.sdk.nats import nats_url

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

HANDED_OVER = 1024
"""KV caches whose handles a prefill engine remembers: as many as a worker has calls at once. A caller that leaves says
so at once, and a handle is of no use after its lease; those of long prompts have thousands of blocks each."""

ALONE_ON_A_CARD = 0.9
"""Share of a card's memory that one engine takes: vLLM's own default."""

Role = Literal["both", "prefill", "decode"]

_KV_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True)
class ImageInput:
    """One image of a prompt, in prompt order.

    Attributes:
        uuid: identity of the content for vLLM's caches (of tenant, image digest, size and tower revision).
        tensor: (tokens, hidden) embedding or, for families whose vLLM model takes none, (height, width, 3) uint8
            pixels; None where the KV cache is taken over and only ``metadata`` is needed.
        metadata: what the model needs beside the embedding, such as ``image_grid_thw``.
    """

    uuid: str
    tensor: torch.Tensor | None = None
    metadata: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefilled:
    """A prompt whose KV cache waits to be pulled, once, by a decode engine that is told to before ``until`` (Unix
    seconds)."""

    kv: dict[str, Any]
    until: float
    token_ids: list[int]
    queue_seconds: float
    first: Delta | None = None
    """The answer's first token, where one was asked for and the decode engine can go on behind it."""


class HandedOver(msgspec.Struct):
    """What vLLM 0.31 takes for granted of a KV cache that it is to pull: without one of these its EngineCore ends."""

    do_remote_prefill: Literal[True]
    remote_block_ids: Annotated[list[Any], msgspec.Meta(min_length=1)]
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    tp_size: int


class LanguageEngine:
    """An AsyncLLM and its EngineCore process. Build it with `start`, end it with `close`."""

    def __init__(self, engine: Any, role: Role, silence: float):
        self._engine = engine
        self._role = role
        self._silence = silence
        self._heard = time.monotonic()
        self._processes: list[psutil.Process] = []
        self._max_model_len: int = engine.model_config.max_model_len
        self._handed_over: Given[dict[str, Any]] = Given(most=HANDED_OVER)
        self._being_withdrawn: set[str] = set()
        if role == "prefill":
            self._note_what_is_handed_over()

    @classmethod
    async def start(
        cls, engine_args: Mapping[str, Any], role: Role, silence: float, delta_seconds: float = 0.005
    ) -> LanguageEngine:
        """Loads the model in a child process (tens of seconds).

        ``engine_args`` are vLLM's by name and win over what the role sets. ``silence`` is how many seconds the engine
        may leave requests without any output before it counts as hung. Tokens that come within ``delta_seconds`` after
        others wait so long for more (`gathering`). Raises whatever vLLM raises for arguments that do not fit
        the model.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        os.environ[DELTA_SECONDS] = str(delta_seconds)
        arguments: dict[str, Any] = {
            "enable_mm_embeds": True,
            # Embeddings bypass it, and it would hold every image twice (front and EngineCore).
            "mm_processor_cache_gb": 0,
            "use_tqdm_on_load": False,
            # vLLM's own choice unpickles where a checkpoint has no safetensors.
            "load_format": "safetensors",
        }
        if current_platform.is_cpu():
            # Without it vLLM adds a Worker process that spins for a second after every step.
            arguments["distributed_executor_backend"] = "uni"
        if role != "both":
            arguments["kv_transfer_config"] = kv_transfer_config(_KV_ROLE[role], current_platform.device_type)
            os.environ.setdefault("VLLM_NIXL_SIDE_CHANNEL_HOST", routable_host())
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(listening_port())
            try:
                os.environ[dropped.SIDE_CHANNEL_FILE] = dropped.share(dropped.SIDE_CHANNEL)
            except OSError as error:
                log.warning("what the side channel drops is not counted: %s", error)
        fraction = os.environ.get("DYNAMO_GPU_FRACTION")
        if fraction is not None:
            # `dynamo serve` put several workers on this card: each takes its share of what one would take alone.
            arguments["gpu_memory_utilization"] = ALONE_ON_A_CARD * float(fraction)
        if role == "decode":
            arguments["scheduler_cls"] = "dynamo_epd.engine.scheduler.FailOnPreemption"
        if tracing.ON:
            tracing.start()  # before vLLM starts one of its own, which would not say whose spans these are
            arguments["otlp_traces_endpoint"] = tracing.endpoint()
            os.environ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = tracing.protocol()
        arguments.update(engine_args)
        config = AsyncEngineArgs(**arguments).create_engine_config()
        engine = cls(await asyncio.to_thread(AsyncLLM.from_vllm_config, config), role, silence)
        await engine._warm_up()
        engine._processes = psutil.Process().children(recursive=True)
        return engine

    async def _warm_up(self) -> None:
        """Two tokens: an engine that says it is ready has answered once, and the first request meets a warm one."""
        from vllm import SamplingParams

        sampling = encode_sampling(SamplingParams(temperature=0.0, max_tokens=2, logprobs=1))
        async for _ in self.generate("warm-up", [1, 2, 3], [], sampling=sampling, cache_salt=None):
            pass

    async def prefill(
        self,
        request_id: str,
        token_ids: list[int],
        images: Sequence[ImageInput],
        *,
        cache_salt: str | None,
        streamed: Sequence[int] = (),
        sampling: str | None = None,
    ) -> Prefilled:
        """Fills the KV cache of a prompt, and of what is there of its answer, and keeps it for one reader.

        With ``sampling`` (`encode_sampling`'s text) the token that this samples is the answer's next one. A decode
        engine that is given it behind the prompt has nothing of it to pull: it computes what that token adds to the KV
        cache, as it does for the last token of any prompt. Without, it is thrown away.

        Raises:
            InvalidRequest: the expanded prompt does not fit the model.
            Retryable: the engine gave the request up, or its caller had left before it was begun.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, detokenize=False) if sampling is None else decode_sampling(sampling)
        params.extra_args = {
            "kv_transfer_params": {
                "do_remote_decode": True,
                "do_remote_prefill": False,
                "remote_engine_id": None,
                "remote_block_ids": None,
                "remote_host": None,
                "remote_port": None,
            }
        }
        last = None
        prompt = await self._rendered(token_ids, images, cache_salt, params, streamed)
        only = params.max_tokens == 1
        params.max_tokens = 1
        params.min_tokens = min(params.min_tokens, 1)
        # From here to EngineCore nothing is waited for: `withdraw` finds a prompt there, or was here first.
        if request_id in self._being_withdrawn or self._handed_over.has_left(request_id):
            raise Retryable("the caller left before its prompt was prefilled")
        async for output in self._run(request_id, prompt, params):
            last = output
        if last is None or last.kv_transfer_params is None:
            raise Retryable("prefill ended without a KV cache to hand over")
        _trace_hand_over(last.kv_transfer_params)
        until = time.time() + TAKE_OVER_SECONDS
        first = None
        # The decode engine pulls into the blocks of its own prompt. Were the token the first of a block, that would be
        # one more than there are here.
        block_size = self._engine.vllm_config.cache_config.block_size
        if sampling is not None and (only or len(last.prompt_token_ids) % block_size):
            first = _delta(last, first=True)
            if first.finish_reason == "length" and not only:
                first = replace(first, finish_reason=None)
        return Prefilled(last.kv_transfer_params, until, list(last.prompt_token_ids), queued(last), first)

    def _note_what_is_handed_over(self) -> None:
        """As soon as EngineCore says it: AsyncLLM drops what is said of a request that was aborted on this side."""
        core = self._engine.engine_core
        receive = core.get_output_async

        async def noting() -> Any:
            outputs = await receive()
            for output in outputs.outputs:
                if output.kv_transfer_params is not None:
                    request_id, _, _ = output.request_id.rpartition("-")  # without what vLLM appended to ours
                    self._handed_over.give(request_id, output.kv_transfer_params)
            return outputs

        core.get_output_async = noting

    async def withdraw(self, request_id: str) -> dict[str, Any] | None:
        """Ends a prefill whose caller has left. Returns the KV cache that waits for a reader all the same, if any: the
        engine may have ended before it was told. A decode engine must `reject` it."""
        self._being_withdrawn.add(request_id)
        try:
            await self._engine.abort(request_id)
            # EngineCore takes up and says one thing after the other: what comes before this reply is all there will be.
            await self._engine.is_sleeping()
            while not self._engine.engine_core.outputs_queue.empty():
                await asyncio.sleep(0)
            handed_over = self._handed_over.take_back(request_id)
        finally:
            self._being_withdrawn.discard(request_id)
        return handed_over[-1] if handed_over else None  # those before were seen: a request may come here twice

    async def generate(
        self,
        request_id: str,
        token_ids: list[int],
        images: Sequence[ImageInput],
        *,
        sampling: str,
        cache_salt: str | None,
        streamed: Sequence[int] = (),
        reasoning: Reasoning | None = None,
        kv: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Streams the answer, or what follows the tokens that are ``streamed`` of it. With ``kv`` the prompt's KV cache
        is pulled from the engine that prefilled it. That is told to keep it no longer, however this ends.

        ``sampling`` is `encode_sampling`'s text. Closing the iterator aborts the request in the engine.

        Raises:
            InvalidRequest: the expanded prompt does not fit the model, or ``kv`` is none.
            InternalError: a grammar is to hold after the reasoning, and this engine was started without its parser.
            Preempted: the engine lost the KV cache (preemption, or it could not be pulled), or stood still meanwhile.
        """
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = decode_sampling(sampling)
        params.output_kind = RequestOutputKind.DELTA
        if kv is not None:
            if self._role != "decode":
                # vLLM would ignore it and prefill the placeholder tokens: a wrong answer in silence.
                raise InternalError("this engine cannot take a KV cache over")
            _check_handed_over(kv)
            _trace_hand_over(kv)
            params.extra_args = {"kv_transfer_params": kv}
        try:
            parser = self._engine.vllm_config.structured_outputs_config.reasoning_parser
            if params.structured_outputs is not None and reasoning is not None and not (reasoning.ended or parser):
                raise InternalError("'reasoning-parser' is set for the Processor, and not for the DecodeWorker")
            begun = time.time()
            prompt = await self._rendered(token_ids, images, cache_salt, params, streamed)
            if kv is not None and (took := time.time() - begun) > STILL_SECONDS:
                log.warning("%s: %.1f s until its KV cache could be pulled; it is given up", request_id, took)
                raise Preempted("the KV cache was not pulled in time")
        except BaseException:
            if kv is not None:
                with suppress(EngineDeadError):  # its lease ends by itself
                    await self.reject(request_id, kv)
            raise
        first = True
        pulled = kv is None or not tracing.ON
        outputs = self._run(request_id, prompt, params, reasoning)
        try:
            async for output in outputs:
                if kv is not None and not pulled:
                    pulled = _trace_pull(kv, output.kv_transfer_params)
                completion = output.outputs[0]
                if completion.finish_reason in ("error", "abort"):
                    raise Preempted("the decode engine lost the KV cache of this request")
                if not completion.token_ids and completion.finish_reason is None:
                    continue
                yield _delta(output, first=first)
                first = False
        finally:
            await outputs.aclose()

    async def reject(self, request_id: str, kv: dict[str, Any]) -> None:
        """Tells the engine that prefilled it that nobody will pull this KV cache, so that it frees the blocks now.

        Raises InvalidRequest where ``kv`` is none.
        """
        _check_handed_over(kv)
        await self._engine.notify_kv_transfer_request_rejected(request_id, kv)

    @property
    def alive(self) -> bool:
        """False once the engine's process is gone, or stands still. It does not come back: end this process too."""
        self._end_the_stopped()
        hung = self.unfinished > 0 and time.monotonic() - self._heard > self._silence
        if hung:
            log.error("the engine has said nothing for %g s, with %d requests", self._silence, self.unfinished)
        return not (hung or self._engine.errored)

    def _end_the_stopped(self) -> None:
        """A process of the engine that was stopped answers nobody. Once it is dead vLLM tells all who wait for it."""
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    log.error("%s is stopped and is ended", process.name())
                    process.kill()

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return int(self._engine.output_processor.get_num_unfinished_requests())

    def close(self) -> None:
        """Ends the EngineCore process; running requests fail."""
        self._engine.shutdown()

    async def _rendered(
        self,
        token_ids: list[int],
        images: Sequence[ImageInput],
        cache_salt: str | None,
        params: Any,
        streamed: Sequence[int],
    ) -> Any:
        """The prompt as vLLM takes it; ``params`` are cut to what fits behind it."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt

        prompt = TokensPrompt(prompt_token_ids=token_ids)
        if images:
            prompt["multi_modal_data"] = {"image": multi_modal_data(images)}
            prompt["multi_modal_uuids"] = {"image": [image.uuid for image in images]}
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        renderer = self._engine.renderer
        try:
            (rendered,) = await renderer.render_cmpl_async(
                [prompt], renderer.default_cmpl_tok_params.with_kwargs(max_length=None)
            )
        except (ValueError, VLLMClientError, AssertionError, RuntimeError) as error:
            # Placeholders and images that do not match: a template that drops an image, or a prompt of token ids. vLLM
            # raises one or the other, by the model's processor and by where it notices.
            if not images:
                raise
            raise InvalidRequest("the prompt does not hold one place for each of its images") from error
        rendered["prompt_token_ids"] = [*rendered["prompt_token_ids"], *streamed]
        length = len(rendered["prompt_token_ids"])
        room = self._max_model_len - length
        if room < 1:
            raise InvalidRequest(
                f"This model's maximum context length is {self._max_model_len} tokens. However, your messages resulted "
                f"in {length} tokens. Please reduce the length of the messages.",
                param="messages",
                code="context_length_exceeded",
            )
        params.max_tokens = min(params.max_tokens or room, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        return rendered

    async def _run(
        self, request_id: str, prompt: Any, params: Any, reasoning: Reasoning | None = None
    ) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self.unfinished:
            self._heard = time.monotonic()
        try:
            outputs = self._engine.generate(
                prompt,
                params,
                request_id,
                trace_headers=tracing.carried(),
                reasoning_ended=reasoning and reasoning.ended,
                reasoning_parser_kwargs=reasoning and {"chat_template_kwargs": reasoning.template},
            )
            async for output in outputs:
                self._heard = time.monotonic()
                yield output
        except VLLMValidationError as error:
            # Its text would go on with the client's value.
            raise InvalidRequest(str(error.args[0]), param=error.parameter) from error
        except EngineDeadError as error:
            raise WorkerLost("the engine's process is gone") from error


def _delta(output: Any, *, first: bool) -> Delta:
    completion = output.outputs[0]
    return Delta(
        token_ids=list(completion.token_ids),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        logprobs=_logprobs(completion.logprobs, completion.token_ids),
        prompt_tokens=len(output.prompt_token_ids) if first else None,
        queue_seconds=queued(output) if first else None,
    )


def _check_handed_over(kv: dict[str, Any]) -> None:
    try:
        msgspec.convert(kv, HandedOver)
    except msgspec.ValidationError as error:
        raise InvalidRequest("what was handed over is no KV cache") from error


def _trace_hand_over(kv: Mapping[str, Any]) -> None:
    """Tells the current span whose KV cache is handed over, and its blocks: both ends say the same of it."""
    blocks = sum(len(group) if isinstance(group, Sequence) else 1 for group in kv["remote_block_ids"])
    tracing.current().describe({"kv.engine": kv["remote_engine_id"], "kv.blocks": blocks})


def _trace_pull(kv: Mapping[str, Any], told: Mapping[str, Any] | None) -> bool:
    """A span for the KV cache's way here, once the scheduler has told of it (`scheduler` says what its times are). What
    was in this engine's prefix cache already is not pulled, and has none."""
    if told is None or PULLED not in told:
        return False
    began, ended, came = told[PULLED]
    error = None if came else HandOffFailed("the KV cache could not be pulled")
    tracing.past("nixl.read_kv", began, ended, {"kv.engine": kv["remote_engine_id"]}, error)
    return True


def queued(output: Any) -> float:
    """Seconds from a request's arrival in the engine to its first step, a KV cache's way here among them."""
    stats = output.metrics  # None where the operator has disabled vLLM's
    return max(0.0, stats.scheduled_ts - stats.queued_ts) if stats is not None else 0.0


def multi_modal_data(images: Sequence[ImageInput]) -> Any:
    """The ``image`` entry of vLLM's ``multi_modal_data`` for images that all came the same way.

    Raises InvalidRequest for others: a message of somebody who is no encode worker of this graph.
    """
    import torch

    tensors = [image.tensor for image in images if image.tensor is not None]
    names = images[0].metadata.keys()
    lengths = {name: {len(image.metadata.get(name, ())) for image in images} for name in names}
    pixels = bool(tensors) and tensors[0].dtype == torch.uint8
    if (
        any(image.metadata.keys() != names for image in images)
        or any(len(found) > 1 for found in lengths.values())
        or len({tensor.dtype for tensor in tensors}) > 1
        or (not pixels and len({tensor.shape[1:] for tensor in tensors}) > 1)
    ):
        raise InvalidRequest("what is said of the images does not go together")
    if pixels:
        from PIL import Image

        return [Image.fromarray(tensor.numpy()) for tensor in tensors]
    if not names:
        # One tensor an image: (tokens, hidden). vLLM knows embeddings from pixels by their two dimensions. Copied: it
        # sends them to EngineCore from where they lie, and that may be over later than the request, whose place in the
        # arena is then another's.
        return [tensor.clone() for tensor in tensors]
    data: dict[str, Any] = {name: torch.tensor([image.metadata[name] for image in images]) for name in names}
    if tensors:
        data["image_embeds"] = torch.cat(tensors)
    return data


def kv_transfer_config(kv_role: str, device: str) -> dict[str, Any]:
    """vLLM's own NIXL connector, with our lease and without silent recomputation."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": kv_role,
        "kv_buffer_device": device,
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kv_lease_duration": KV_LEASE_SECONDS},
    }


def encode_sampling(params: Any) -> str:
    """vLLM's SamplingParams as JSON. Detokenizing and stop strings stay with the processor, so they are left out."""
    params = params.clone()
    params.n = 1
    params.detokenize = False
    params.stop = []
    params.output_text_buffer_length = 0
    return msgspec.json.encode(params).decode()


def decode_sampling(text: str) -> Any:
    """What `encode_sampling` wrote. Raises InvalidRequest on anything else."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        return msgspec.json.decode(text, type=SamplingParams)
    except (msgspec.MsgspecError, VLLMValidationError) as error:
        raise InvalidRequest("malformed sampling parameters") from error


def _logprobs(positions: Any, token_ids: Sequence[int]) -> list[TokenLogprobs] | None:
    if positions is None:
        return None
    return [
        TokenLogprobs(list(entry), [value.logprob for value in entry.values()], entry[token].rank)
        for entry, token in zip(positions, token_ids, strict=True)
    ]


def routable_host() -> str:
    """The address under which peers reach this process.

    ``DYNAMO_HOST`` where the operator sets it, else the one that this machine uses towards NATS, which all peers reach
    too: loopback when NATS runs here.
    """
    named = os.environ.get("DYNAMO_HOST")
    if named:
        return named
    server = urlsplit(nats_url())
    family, kind, _, _, address = socket.getaddrinfo(server.hostname, server.port or 4222, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # chooses a route; a datagram socket sends nothing by it
        return str(probe.getsockname()[0])


def listening_port() -> int:
    """A free port below those that the kernel gives to outgoing connections.

    The engine binds it half a minute later. One of those could be taken by then, and the connector of vLLM 0.31 waits
    for ever where its listener cannot bind.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(max(1024, first - 12_000), first)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
