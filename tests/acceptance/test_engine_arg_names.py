# SPDX-License-Identifier: Apache-2.0
"""The names read from vLLM's source are those of the real class (importing vLLM takes its time)."""

from __future__ import annotations

import subprocess
import sys

from dynamo_epd.sdk.engine_args import engine_arg_names


def test_names_are_those_of_the_real_class() -> None:
    code = (
        "import dataclasses; from vllm.engine.arg_utils import AsyncEngineArgs;"
        "print(*[field.name for field in dataclasses.fields(AsyncEngineArgs)])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert engine_arg_names() == set(ran.stdout.splitlines()[-1].split())
