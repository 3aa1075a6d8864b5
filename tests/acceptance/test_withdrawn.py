# SPDX-License-Identifier: Apache-2.0
"""A prefill whose caller leaves in the moment in which the engine ends it: its KV cache is found and given back."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack, suppress
from typing import Any

from tests.serving import untrained

ENDED = 3.0
"""Seconds after which the engine has prefilled a prompt, although this process has not looked yet."""
LEASE = 10.0


def test_what_was_handed_over_to_nobody_is_withdrawn() -> None:
    asyncio.run(_leave_a_prefill())


async def _leave_a_prefill() -> None:
    args: dict[str, Any] = {
        "model": str(untrained("llava")),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "block_size": 128,
        "num_gpu_blocks_override": 2048 // 128 + 1,
    }
    from dynamo_epd.engine.environment import prepare

    prepare(args)
    from dynamo_epd.engine.language import LanguageEngine

    with ExitStack() as stack:
        prefill = await LanguageEngine.start(args, "prefill", 120)
        stack.callback(prefill.close)
        decode = await LanguageEngine.start(args, "decode", 120)
        stack.callback(decode.close)

        prompt = [1 + place % 100 for place in range(1900)]
        left = asyncio.create_task(prefill.prefill("left", prompt, [], cache_salt=None))
        await begun(left, prefill)
        await asyncio.sleep(0.02)  # until it is sent
        time.sleep(ENDED)  # noqa: ASYNC251 that nothing runs in this loop is the point
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left
        kv = await prefill.withdraw("left")
        assert kv is not None, "the engine ended before it was told"
        assert await prefill.withdraw("left") is None
        await decode.reject("left", kv)
        async with asyncio.timeout(LEASE / 2):  # there is room for one such prompt
            after = await prefill.prefill("after", prompt, [], cache_salt=None)
        await decode.reject("after", after.kv)

        early = asyncio.create_task(prefill.prefill("early", prompt, [], cache_salt=None))
        await begun(early, prefill)
        early.cancel()
        with suppress(asyncio.CancelledError):
            await early
        kv = await prefill.withdraw("early")
        if kv is not None:  # an engine that had it all the same
            await decode.reject("early", kv)
        assert prefill.unfinished == 0
        async with asyncio.timeout(LEASE / 2):
            await prefill.prefill("last", prompt, [], cache_salt=None)


async def begun(task: asyncio.Task[Any], engine: Any) -> None:
    while not engine.unfinished:
        assert not task.done(), task.exception()
        await asyncio.sleep(0)
