# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler that fails a request whose KV it must give up or may no longer pull, instead of answering wrongly.

On preemption vLLM frees a request's KV blocks and later recomputes them from token 0. A decode worker cannot: where
the prompt had images it holds placeholder tokens, not embeddings, and would prefill nonsense in silence. Here such a
request ends with ``FinishReason.ERROR`` in the step that preempted it; the processor then conducts encode → prefill →
decode again, with the tokens that were already streamed appended to the prompt.

The same becomes of a request whose KV is still to be pulled, or on its way, in an engine that stood still: only its
heartbeats keep the blocks on the other side (`lease`).

It is also where a pull's begin and end are known. vLLM's NIXL connector tells durations and bytes without saying whose
they are (``vllm:nixl_xfer_time_seconds``), and the other side knows only that it was READ. The scheduler hands each
request to the connector, and hears from it when that is done. So that is what a pull's time is here: the READs, before
them the handshake with an engine that is met for the first time, after them the rest of the step that found them done.

Named by ``scheduler_cls`` and loaded inside vLLM's EngineCore process.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from dynamo_epd.engine.lease import PULLED, STILL_SECONDS

_UNPULLED = (
    RequestStatus.WAITING,
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS,
)


@dataclass
class _Pull:
    """Unix seconds."""

    began: float
    ended: float | None = None


class FailOnPreemption(AsyncScheduler):
    """vLLM's default scheduler, except for requests whose KV came from another engine."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lost: list[Request] = []
        self._unpulled: dict[str, float] = {}
        """Requests whose KV is not here yet, and when this engine last turned with them (Unix seconds)."""
        self._pulls: dict[str, _Pull] = {}
        """Of requests that are traced, until they end."""
        self._being_pulled: set[str] = set()
        self.goes_on = False
        """Whether the last step found a pull done, and what waited for it can be computed, or began one, which within a
        host is done when NIXL's call returns (`plugin`)."""

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            self._unpulled[request.request_id] = request.arrival_time

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        now = time.time()
        for request_id, seen in list(self._unpulled.items()):
            request = self.requests.get(request_id)
            if request is None or request.status not in _UNPULLED:
                del self._unpulled[request_id]
            elif now - seen > STILL_SECONDS:
                del self._unpulled[request_id]
                self._pulls.pop(request_id, None)  # given up: whether and when it comes says nothing any more
                self._lost.extend(self.finish_requests(request_id, RequestStatus.FINISHED_ERROR))
            else:
                self._unpulled[request_id] = now
        planned = super().schedule(throttle_prefills)
        self.goes_on = self._note_begun_pulls()
        return planned

    def _note_begun_pulls(self) -> bool:
        """Whether there are any."""
        for request_id in [one for one in self._pulls if one not in self.requests]:
            del self._pulls[request_id]
        before, self._being_pulled = self._being_pulled, set()
        for request_id in self._unpulled:
            request = self.requests.get(request_id)
            if request is None or request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
                continue
            self._being_pulled.add(request_id)
            if request.trace_headers:
                self._pulls.setdefault(request_id, _Pull(time.time()))
        return not self._being_pulled <= before

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        if request.kv_transfer_params is not None:
            # At once, not after the step: with asynchronous scheduling the next step is planned before this
            # one's outputs are read, and it could resume the request from its placeholder tokens.
            self._lost.extend(self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now = time.time()
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
        heard = model_runner_output.kv_connector_output
        arrived = (heard and heard.finished_recving) or set()
        self.goes_on = self.goes_on or bool(arrived)
        if self._pulls:
            self._tell_pulls(outputs, arrived, now)
        return outputs

    def _tell_pulls(self, outputs: dict[int, EngineCoreOutputs], arrived: set[str], now: float) -> None:
        """In every output of a request whose pull has ended: AsyncLLM keeps only the last of those that it merges.
        ``arrived``: whose pull the connector says to have ended, well or not, in the step that ``outputs`` are of."""
        for request_id in arrived & self._pulls.keys():
            self._pulls[request_id].ended = now
        for output in (one for of_client in outputs.values() for one in of_client.outputs):
            pull = self._pulls.get(output.request_id)
            if pull is None:
                continue
            if output.finished:
                del self._pulls[output.request_id]
            if pull.ended is not None and output.kv_transfer_params is None:
                # Nothing was computed from it yet: it is for the pull that vLLM ends the request.
                failed = output.finish_reason == FinishReason.ERROR and output.request_id in arrived
                output.kv_transfer_params = {PULLED: [pull.began, pull.ended, not failed]}
