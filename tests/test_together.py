# SPDX-License-Identifier: Apache-2.0
"""Which of an answer's outputs travel together, by vLLM's own outputs and a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from dynamo_epd.engine.together import together

Said = asyncio.Queue[RequestOutput | Exception]


def output(*token_ids: int, finished: bool = False) -> RequestOutput:
    reason = "length" if finished else None
    completion = CompletionOutput(0, "", list(token_ids), None, None, finish_reason=reason)
    return RequestOutput("r", None, [1], None, [completion], finished)


async def engine(said: Said, closed: list[str]) -> AsyncGenerator[RequestOutput, None]:
    try:
        while True:
            one = await said.get()
            if isinstance(one, Exception):
                raise one
            yield one
            if one.finished:
                return
    finally:
        closed.append("closed")


def turned(test: Callable[[Callable[[float], Coroutine[Any, Any, None]]], Coroutine[Any, Any, None]]) -> None:
    """Runs it with a loop whose clock stands still; the test is given what turns it by so many seconds."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        now = loop.time()
        loop.time = lambda: now  # type: ignore[method-assign]

        async def turn(seconds: float) -> None:
            nonlocal now
            now += seconds
            for _ in range(20):
                await asyncio.sleep(0)

        runner.run(test(turn))


def test_tokens_travel_together_until_it_is_time_and_the_first_and_the_last_at_once() -> None:
    async def test(turn: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        said, closed, heard = Said(), list[str](), list[list[int]]()

        async def listen() -> None:
            async for one in together(engine(said, closed), 0.005):
                heard.append(list(one.outputs[0].token_ids))

        listening = asyncio.create_task(listen())
        said.put_nowait(output(1))
        await turn(0)
        assert heard == [[1]]
        for token in (2, 3):
            said.put_nowait(output(token))
            await turn(0.002)
            assert heard == [[1]], "sooner than 5 ms after the first"
        await turn(0.002)
        assert heard == [[1], [2, 3]]
        await turn(0.005)
        said.put_nowait(output(4))
        await turn(0)
        assert heard == [[1], [2, 3], [4]], "later than 5 ms after the one before: at once"
        said.put_nowait(output(5))
        said.put_nowait(output(6, finished=True))
        await turn(0)
        assert heard == [[1], [2, 3], [4], [5, 6]], "the last waits for nothing"
        await listening
        assert closed == ["closed"]

    turned(test)


def test_what_came_before_an_error_is_heard_first() -> None:
    async def test(turn: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        said, closed, heard = Said(), list[str](), list[int]()
        for one in (output(1), output(2), RuntimeError("gone")):
            said.put_nowait(one)
        outputs = together(engine(said, closed), 0.005)

        async def listen() -> None:
            async for one in outputs:
                heard.extend(one.outputs[0].token_ids)

        with pytest.raises(RuntimeError, match="gone"):
            await listen()
        assert (heard, closed) == ([1, 2], ["closed"])

    turned(test)


def test_who_leaves_closes_what_it_listens_to() -> None:
    async def test(turn: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        said, closed = Said(), list[str]()
        outputs = together(engine(said, closed), 0.005)
        said.put_nowait(output(1))
        assert (await anext(outputs)).outputs[0].token_ids == [1]
        said.put_nowait(output(2))
        await turn(0)
        await outputs.aclose()
        assert closed == ["closed"]

    turned(test)
