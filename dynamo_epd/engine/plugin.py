# SPDX-License-Identifier: Apache-2.0
"""Runs inside every process of vLLM (entry point ``vllm.general_plugins``), before models load and NIXL starts.

NIXL's Python class fixes its progress thread's delay at 0, and an idle engine then takes a whole core. With the delay
that ``DYNAMO_NIXL_PROGRESS_DELAY_US`` names it takes half a percent of one. Some model classes are
replaced by those of `dynamo_epd.engine.models`. The process groups of a process share one thread, and an EngineCore
sends tokens that follow each other closely together (`gathering`). A vLLM that our stages did not start lacks the
variable and is left alone.
"""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from dynamo_epd.engine.environment import DELTA_SECONDS, NIXL_DELAY

LISTENER = "nixl_handshake_listener"
"""vLLM's thread that tells decode engines how to READ a prefill engine's KV cache."""

SIDE_CHANNEL = "VLLM_NIXL_SIDE_CHANNEL_PORT"
"""Set where an engine hands its KV cache over."""

MODELS = {
    "InternVLChatModel": "InternVL",
    "InternVLForConditionalGeneration": "InternVLHF",
    "LlavaNextForConditionalGeneration": "LlavaNext",
    "Phi3VForCausalLM": "Phi3V",
}
"""Classes of `dynamo_epd.engine.models` by architecture. vLLM imports them when it loads such a model."""


def register() -> None:
    """Called by vLLM, in some processes more than once."""
    delay = os.environ.get(NIXL_DELAY)
    if delay is None:
        return
    # An EngineCore has vLLM's handlers alone; where the worker has its own this changes nothing.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.excepthook = _die_with_the_listener
    from vllm import ModelRegistry

    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"dynamo_epd.engine.models:{name}")
    _leave_every_core()
    _share_the_loop_of_gloo()
    _go_on_where_a_kv_cache_came()
    _send_together()
    if SIDE_CHANNEL in os.environ:
        _answer_who_is_no_engine()
    try:
        import nixl._api as api
    except ImportError:
        return
    if not isinstance(api.nixlBind, _Calm):
        api.nixlBind = _Calm(api.nixlBind, int(delay))


def _die_with_the_listener(failed: threading.ExceptHookArgs) -> None:
    """An engine whose side channel has died looks alive and is none: nobody can take its KV cache over. At start vLLM
    0.31 would wait for the dead thread for ever."""
    threading.__excepthook__(failed)
    if failed.thread is not None and failed.thread.name == LISTENER:
        os._exit(1)


def _answer_who_is_no_engine() -> None:
    """Puts a listener in the place of vLLM's that outlives what is no handshake."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler

    from dynamo_epd.engine.side_channel import answer_questions

    NixlBaseConnectorScheduler._nixl_handshake_listener = staticmethod(answer_questions)


def _leave_every_core() -> None:
    """Keeps vLLM's NIXL connector from binding an engine to the machine's last core.

    It does so on CPUs, meaning to set a core apart for transfers; but the model runs in that very thread, and prefill
    and decode engines of one machine would all share that one core, where one can keep another waiting for seconds.
    """
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.discover_numa_topology = classmethod(lambda cls: [])


@functools.cache  # once a process
def _go_on_where_a_kv_cache_came() -> None:
    """Lets a step that only began to pull a KV cache, or found one pulled, be followed at once by the one that may
    compute from it.

    vLLM's loop sleeps a millisecond after a step without a forward, as long as requests wait, so that transfers get the
    interpreter. Of an answer that prefill hands over these are the first two things to happen.
    """
    from vllm.v1.engine.core import EngineCore

    EngineCore.step = going_on(EngineCore.step)


def going_on(step: Callable[[Any], tuple[Any, bool]]) -> Callable[[Any], tuple[Any, bool]]:
    """``step`` of an EngineCore, and where that computed nothing and the scheduler `goes_on`, the next ones behind it,
    two at most."""
    from vllm.v1.engine.core import EngineCoreProc

    def stepping(core: Any) -> tuple[Any, bool]:
        outputs, executed = step(core)
        for _ in range(2):
            if executed or not isinstance(core, EngineCoreProc) or not getattr(core.scheduler, "goes_on", False):
                break
            for output in outputs.items():  # as vLLM's loop does with those of each step
                core.output_queue.put_nowait(output)
            outputs, executed = step(core)
        return outputs, executed

    return stepping


@functools.cache  # once a process
def _send_together() -> None:
    """Lets the thread of an EngineCore that sends outputs gather them first."""
    from vllm.v1.engine.core import EngineCoreProc

    from dynamo_epd.engine.gathering import gather

    send = EngineCoreProc.process_output_sockets

    @functools.wraps(send)
    def sending(core: Any, *args: Any, **named: Any) -> None:
        gather(core.output_queue, float(os.environ.get(DELTA_SECONDS, "0")))
        send(core, *args, **named)

    EngineCoreProc.process_output_sockets = sending


@functools.cache  # once a process
def _share_the_loop_of_gloo() -> None:
    """Lets all of Gloo's process groups of this process wait in one thread.

    vLLM makes a dozen of them even for an engine of one rank, and each would have a thread of its own that wakes a
    hundred times a second: more than half of all wakes of an idle graph, a tenth of a percent of a core each.
    """
    from torch.distributed import ProcessGroupGloo
    from torch.distributed.constants import default_pg_timeout

    make = ProcessGroupGloo.__init__

    @functools.cache
    def device(_: int) -> Any:
        return ProcessGroupGloo.create_default_device()

    def make_with_device(group: Any, store: Any, rank: int, size: int, timeout: timedelta = default_pg_timeout) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [device(os.getpid())]  # a thread does not outlive a fork
        options._timeout = timeout
        make(group, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_with_device


class _Calm(SimpleNamespace):
    """NIXL's binding, except that agents are made with a progress delay."""

    def __init__(self, binding: Any, delay: int):
        super().__init__(**vars(binding))

        def make(name: str, config: Any) -> Any:
            config.pthrDelay = delay
            return binding.nixlAgent(name, config)

        self.nixlAgent = make
