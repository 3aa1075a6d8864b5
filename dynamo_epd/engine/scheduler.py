# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler that fails a request whose pulled KV it must give up, instead of recomputing it wrongly.

On preemption vLLM frees a request's KV blocks and later recomputes them from token 0. A decode worker cannot: where
the prompt had images it holds placeholder tokens, not embeddings, and would prefill nonsense in silence. Here such a
request ends with ``FinishReason.ERROR`` in the step that preempted it; the processor then conducts encode → prefill →
decode again, with the tokens that were already streamed appended to the prompt.

Named by ``scheduler_cls`` and loaded inside vLLM's EngineCore process.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


class FailOnPreemption(AsyncScheduler):
    """vLLM's default scheduler, except for requests whose KV came from another engine."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lost: list[Request] = []

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        if request.kv_transfer_params is not None:
            # At once, not after the step: with asynchronous scheduling the next step is planned before this
            # one's outputs are read, and it could resume the request from its placeholder tokens.
            self._lost.extend(self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        lost, self._lost = self._lost, []
        for request in lost:
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs
