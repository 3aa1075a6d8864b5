# SPDX-License-Identifier: Apache-2.0
"""What no decode engine may pull: the KV cache of a caller that left, and one that it had while it stood still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from dynamo_epd.engine.lease import STILL_SECONDS
from dynamo_epd.errors import Preempted, Retryable
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
        "enable_prefix_caching": False,  # or the next prompt would need few blocks beside those that are held
    }
    from dynamo_epd.engine.environment import prepare

    prepare(args)
    from dynamo_epd.engine.language import LanguageEngine

    with ExitStack() as stack:
        prefill = await LanguageEngine.start(args, "prefill", 120)
        stack.callback(prefill.close)
        decode = await LanguageEngine.start(args, "decode", 120)
        stack.callback(decode.close)

        met = await prefill.prefill("met", [1, 2, 3], [], cache_salt=None)
        await _answer(decode, "met", [1, 2, 3], met.kv)  # vLLM rejects at once where the engines have met before

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

        assert await prefill.withdraw("first") is None
        with pytest.raises(Retryable):  # what was withdrawn comes behind what withdrew it
            await prefill.prefill("first", prompt, [], cache_salt=None)
        async with asyncio.timeout(LEASE / 2):
            last = await prefill.prefill("last", prompt, [], cache_salt=None)
        await decode.reject("last", last.kv)
        await _decode_in_an_engine_that_stood_still(prefill, decode)


async def _decode_in_an_engine_that_stood_still(prefill: Any, decode: Any) -> None:
    prompt = [1 + place % 90 for place in range(300)]
    core = max(set(decode._processes) - set(prefill._processes), key=lambda process: process.memory_info().rss)
    filled = await prefill.prefill("still", prompt, [], cache_salt=None)
    os.kill(core.pid, signal.SIGSTOP)
    try:
        answer = asyncio.create_task(_answer(decode, "still", prompt, filled.kv))
        await asyncio.sleep(STILL_SECONDS + 0.5)
    finally:
        os.kill(core.pid, signal.SIGCONT)
    with pytest.raises(Preempted):
        await answer

    again = await prefill.prefill("again", prompt, [], cache_salt=None)
    pulled = await _answer(decode, "again", prompt, again.kv)
    assert pulled == await _answer(decode, "whole", prompt, None), "nothing wrong is in its prefix cache"


async def _answer(engine: Any, name: str, prompt: list[int], kv: dict[str, Any] | None) -> list[int]:
    from vllm import SamplingParams

    from dynamo_epd.engine.language import encode_sampling

    sampling = encode_sampling(SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    salt = None if kv else "by itself"
    deltas = engine.generate(name, prompt, [], sampling=sampling, cache_salt=salt, kv=kv)
    return [token async for delta in deltas for token in delta.token_ids]


async def begun(task: asyncio.Task[Any], engine: Any) -> None:
    while not engine.unfinished:
        assert not task.done(), task.exception()
        await asyncio.sleep(0)
