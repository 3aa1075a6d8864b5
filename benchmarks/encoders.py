# SPDX-License-Identifier: Apache-2.0
"""Encode stages alone, each in a process of its own: ours, and Dynamo's `dynamo.vllm` encode worker.

What runs is the stage's own handler, from the request in hand to the handle that it replies with: fetch, decode,
resize, tower, projector, and the embedding laid out for a reader. There is no NATS and no reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.arms import CPU, QUIET, ROOT, STOCK, TUNED, WORK, environment_without_graphs, install_stock
from benchmarks.figures import Row
from benchmarks.obedient import FAILURES, Obedient, reason

LINE = 16 * 2**20
"""Bytes of a command: pictures travel in it."""
KINDS = ("OURS", "STOCK", "STOCK-tuned")


class EncodeStage(Obedient):
    """The measuring end. The other process loads its model at construction, and is stopped while it is not asked."""

    def __init__(self, kind: str, model: Path):
        environment = environment_without_graphs() | QUIET
        if kind != "OURS":  # ours prepares its own, as a stage of a graph does
            install_stock()
            environment |= CPU | {"PYTHONPATH": os.pathsep.join((str(STOCK.absolute()), str(ROOT)))}
        if kind == "STOCK-tuned":
            environment |= TUNED
        (WORK / "logs").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.encoders", kind, str(model)]
        log = WORK / "logs" / f"encode-{kind}.log"
        super().__init__(f"{kind}'s encode stage", command, environment=environment, directory=ROOT, log=log)

    def wait(self) -> None:
        """Until it has loaded. It spins from then on, if it does, only while it is asked."""
        self.answer()
        self.pause()

    def encode(self, pictures: Sequence[str], most: int | None = None) -> dict[str, Any]:
        """All of them at once, as so many requests: ``seconds``, and ``images`` that went through the tower (None where
        it does not say). ``most``: pictures in one forward of ours, instead of the encode worker's own number."""
        self.go_on()
        answer: dict[str, Any] = self.ask("encode", pictures=list(pictures), most=most)
        self.pause()
        return answer

    def apart(self, pictures: Sequence[str]) -> float:
        """Of ours: how far a number of an embedding that was made in a batch is from the same one made alone, of the
        largest number, at most."""
        self.go_on()
        answer = self.ask("compare", pictures=list(pictures))
        self.pause()
        return float(answer["apart"])


@contextlib.contextmanager
def encode_stages(model: Path, kinds: Sequence[str], row: Row) -> Iterator[dict[str, EncodeStage]]:
    """One of each kind, loaded at once, ended with the block. STOCK's that does not start is left out, and the row is
    told why."""
    with contextlib.ExitStack() as stack:
        stages: dict[str, EncodeStage] = {}
        for kind in kinds:
            with forgiven(kind, stages, row):
                stages[kind] = EncodeStage(kind, model)
                stack.callback(stages[kind].kill)  # what it holds is memory
        for kind, stage in list(stages.items()):
            with forgiven(kind, stages, row):
                stage.wait()
        yield stages


@contextlib.contextmanager
def forgiven(kind: str, stages: dict[str, EncodeStage], row: Row) -> Iterator[None]:
    """One of STOCK's that fails in this block is among the ``stages`` no longer, and the row is told why."""
    try:
        yield
    except FAILURES as error:
        if not kind.startswith("STOCK"):
            raise
        stages.pop(kind, None)
        row.notes.append(f"{kind}: its encode stage failed: {reason(error)}")


Encode = Callable[[Sequence[str], int | None], Awaitable[int | None]]
"""(pictures, most) -> images that went through the tower."""
Compare = Callable[[Sequence[str]], Awaitable[float]]


async def serve(encode: Encode, compare: Compare | None = None) -> None:
    """Obeys one line at a time."""
    reader = asyncio.StreamReader(limit=LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"loaded": True}), flush=True)
    while line := await reader.readline():
        asked = json.loads(line)
        if asked["what"] == "compare" and compare is not None:
            print(json.dumps({"apart": await compare(asked["pictures"])}), flush=True)
            continue
        began = time.perf_counter()
        images = await encode(asked["pictures"], asked["most"])
        print(json.dumps({"seconds": time.perf_counter() - began, "images": images}), flush=True)


def furthest(some: Sequence[Any], others: Sequence[Any]) -> float:
    """Of numbers of two lists of tensors, as a share of the largest one. Infinite where shapes differ, or a number is
    none."""
    if [one.shape for one in some] != [other.shape for other in others]:
        return float("inf")
    apart = [float((one - other).abs().max()) for one, other in zip(some, others, strict=True)]
    if not all(one < float("inf") for one in apart):
        return float("inf")
    return max(apart) / (max(float(other.abs().max()) for other in others) or 1.0)


async def ours(model: str) -> None:
    """`EncodeWorker` without a runtime: nobody READs from it, and it READs from nobody."""
    from components.encode_worker import EncodeConfig, EncodeWorker
    from components.protocol import EncodeRequest, Picture
    from dynamo_epd.sdk import dynamo_context

    engine_args = {"model": model, "dtype": "float32", "enforce_eager": True, "max_model_len": 2048}
    dynamo_context.update(
        namespace="bench",
        component="EncodeWorker",
        service_name="EncodeWorker",
        instance_id=1,
        graph=SimpleNamespace(services={}),
        owner_addresses={"EncodeWorker": ("bench", "EncodeWorker")},
        config=EncodeConfig(engine_args=engine_args),
    )
    worker = EncodeWorker()
    await worker.start()
    counted = {"images": 0, "requests": 0}

    def embed(items: Sequence[Any]) -> Sequence[Any]:
        counted["images"] += len(items)
        return worker.encoder.embed(items)

    def request_about(url: str, tenant: str = "") -> EncodeRequest:
        counted["requests"] += 1
        return EncodeRequest(f"bench-{counted['requests']}", tenant, Picture(url=url))

    def batches_of(most: int) -> None:
        worker.batcher.close()
        worker.batcher = worker.batches(embed, most)

    async def one(url: str) -> None:
        async for encoded in worker.encode(request_about(url)):
            worker.arena.release(encoded.handle.lease)

    async def encode(pictures: Sequence[str], most: int | None) -> int:
        batches_of(most or worker.config.max_batch)
        before = counted["images"]
        await asyncio.gather(*(one(url) for url in pictures))
        return counted["images"] - before

    async def read(url: str, tenant: str) -> Any:
        """Its embedding, as a reader has it."""
        (encoded,) = [encoded async for encoded in worker.encode(request_about(url, tenant))]
        async with worker.arena.read([encoded.handle], timeout=worker.config.lease_seconds) as (embedding,):
            return embedding.float().clone()

    async def compare(pictures: Sequence[str]) -> float:
        """Tenants share nothing: what one has had encoded is encoded anew for the other."""
        batches_of(worker.config.max_batch)
        together = await asyncio.gather(*(read(url, "together") for url in pictures))
        batches_of(1)
        return furthest(together, [await read(url, "alone") for url in pictures])

    await serve(encode, compare)


async def stock(model: str) -> None:
    """Dynamo's `EncodeWorkerHandler`, with the defaults of its command line."""
    from dynamo.vllm.constants import EmbeddingTransferMode
    from dynamo.vllm.multimodal_handlers import EncodeWorkerHandler
    from dynamo.vllm.multimodal_utils.protocol import MultiModalGroup, MultiModalInput, vLLMMultimodalRequest
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # where the tuned one's NIXL learns to rest
    arguments = AsyncEngineArgs(model=model, dtype="float32", enforce_eager=True, max_model_len=2048)
    handler = EncodeWorkerHandler(arguments, EmbeddingTransferMode.NIXL_WRITE)
    await handler.async_init(None)

    async def one(number: int, url: str) -> None:
        request = vLLMMultimodalRequest(
            engine_prompt={"prompt_token_ids": []},
            sampling_params=SamplingParams(),
            request_id=f"bench-{number}",
            multimodal_inputs=[MultiModalGroup(multimodal_input=MultiModalInput(image_url=url))],
        )
        async for _ in handler.generate(request, None):
            pass

    async def encode(pictures: Sequence[str], most: int | None) -> None:
        await asyncio.gather(*(one(number, url) for number, url in enumerate(pictures)))

    await serve(encode)


if __name__ == "__main__":
    kind, checkpoint = sys.argv[1:]
    asyncio.run((ours if kind == "OURS" else stock)(checkpoint))
