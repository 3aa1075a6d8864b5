# SPDX-License-Identifier: Apache-2.0
"""What vLLM must find in the environment before it is imported. `prepare` is the first thing a stage's start does."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

NIXL_DELAY = "DYNAMO_NIXL_PROGRESS_DELAY_US"
"""Microseconds that NIXL's progress thread sleeps between polls, in vLLM's processes too: see `plugin`."""
DELTA_SECONDS = "DYNAMO_DELTA_SECONDS"
"""How long an EngineCore leaves tokens for those that follow: see `gathering`."""


def prepare(engine_args: Mapping[str, Any]) -> None:
    """Sets defaults; what the operator has set stays.

    On a machine without a GPU: one thread a process (stages share the cores), a small KV cache, and no extra Worker
    process behind each engine, which would spin for a second after every step.
    """
    os.environ.setdefault(NIXL_DELAY, "2000")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if "DYNAMO_SUPERVISOR_PID" in os.environ:
        # vLLM leaves the sockets between its processes behind; in the supervisor's directory they go with the graph.
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(Path(os.environ["NOTIFY_SOCKET"]).parent))
    if logging.getLogger().getEffectiveLevel() >= logging.WARNING:
        # A healthy start prints some forty warnings about what a machine lacks; `dynamo serve -v` shows them.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_LOGS", "-all")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("vllm").setLevel(logging.ERROR)
    if Path(str(engine_args.get("model", ""))).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if cpu_build():
        if engine_args.get("kv_cache_memory_bytes") is None:  # vLLM lets the variable win over the argument
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if engine_args.get("enforce_eager"):
            # vLLM's sampler would still have torch compile its log-probability helper: a C++ compiler run of 40 s in
            # the middle of the first request that asks for log probabilities.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def cpu_build() -> bool:
    """Whether the installed vLLM is the CPU one; told without importing it."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True
