# SPDX-License-Identifier: Apache-2.0
"""Reading vLLM's argument names imports nothing. That they are the right ones: acceptance/test_engine_arg_names.py."""

from __future__ import annotations

import subprocess
import sys


def test_reading_them_does_not_import_vllm() -> None:
    code = (
        "import sys; from dynamo_epd.sdk.engine_args import engine_arg_names;"
        "assert 'kv_transfer_config' in engine_arg_names(); print('vllm' in sys.modules, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False False"
