# SPDX-License-Identifier: Apache-2.0
"""What a prefill engine remembers of KV caches that it handed over, over a double of vLLM's. No engine, no weights."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from dynamo_epd.engine.language import HANDED_OVER, LanguageEngine


class EngineDouble:
    """An AsyncLLM whose EngineCore says that one prefill after the other has ended."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=64)
        self.engine_core = SimpleNamespace(get_output_async=self._said, outputs_queue=asyncio.Queue())
        self.ended = 0

    async def _said(self) -> Any:
        self.ended += 1
        output = SimpleNamespace(request_id=f"call-{self.ended}-1a2b3c4d", kv_transfer_params={"blocks": self.ended})
        return SimpleNamespace(outputs=[output, SimpleNamespace(request_id="other-1", kv_transfer_params=None)])

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
