# SPDX-License-Identifier: Apache-2.0
"""What is measured side by side: plain vLLM, Dynamo's own encode, prefill and decode workers, and our graphs.

Every arm answers OpenAI's routes at ``url``. *Tuned* ones have our engine settings (`TUNED`), so what settings win and
what the design wins are told apart: no Worker process, nothing compiled, no log line a request. One of them
also calls upon `dynamo_epd.engine.plugin`, which every vLLM here loads, and so they have all that it registers: a
progress thread of NIXL's that rests, engines that NIXL's connector binds to no core, a side channel that outlives what
is no handshake, an engine that ends with its side channel, stacks at SIGUSR1, and our classes of some models that no
row serves. They keep vLLM's cache of processed pictures: ours go without, for embeddings bypass it, but who is asked
with pixels wins by it. The others are as they are shipped, but for what they need to run here at all, one beside the
other: float32, no compiler, one thread of torch's in a process, a KV cache and a receive buffer that leave memory to
the rest.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from benchmarks.load import MODEL, chat, picture

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("build/bench")
BIN = Path(sys.executable).parent
STOCK = WORK / "stock"
"""Where ``ai-dynamo`` is installed, apart: it registers plugins of pytest and vLLM."""
STOCK_PIN = "ai-dynamo==1.6.1"
START_SECONDS = 400.0
STOP_SECONDS = 60.0
KEEP_SECONDS = 2.0
"""From one touch of an arm's discovery files to the next."""
MAX_MODEL_LEN = 2048

KV_BYTES = 256 * 2**20
"""Of each engine: resident from its start on. Nine engines stand at once, and nobody needs more."""

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)]
ENGINE += ["--kv-cache-memory-bytes", str(KV_BYTES)]
CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Of torch's in each process of an engine, on any core. Of two cores vLLM itself would take one, and bind the thread to
it: as fast for one engine, but it would be the same core for two."""
TUNED = ONE_THREAD | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DYNAMO_NIXL_PROGRESS_DELAY_US": "2000"}
TUNED |= {"TORCHDYNAMO_DISABLE": "1"}  # as ours under `enforce-eager`, which all have
TUNED |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_LOGS": "-all", "TORCH_CPP_LOG_LEVEL": "ERROR"}
TUNED |= {"PYTHONWARNINGS": "ignore::FutureWarning"}
QUIET = {"VLLM_NO_USAGE_STATS": "1"}


Started = tuple[list[str], dict[str, str]]
"""A command, and what its environment has beside ours."""


class Arm:
    """``with`` starts its processes, all at once, and ends them. `commands` are what a reader types."""

    def __init__(
        self,
        name: str,
        started: list[Started],
        port: int,
        *,
        spins: bool = False,
        pictures: bool = True,
        discovery: Path | None = None,
    ):
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.seconds_to_answer = 0.0
        """From the first command to the first answer, about a picture where it takes them."""
        self.first_said = ""
        """That answer."""
        self.spins = spins
        """Whether it takes whole cores while nobody asks it anything."""
        self._pictures = pictures
        self._discovery = discovery
        self._started = started
        self._processes: list[subprocess.Popen[bytes]] = []
        self._began = 0.0
        self._closed = threading.Event()

    @property
    def commands(self) -> list[str]:
        """As they are typed in the root of a clone."""
        typed = [
            " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
            for command, environment in self._started
        ]
        return [one.replace(f"{ROOT}/", "") for one in typed]

    @property
    def ended(self) -> bool:
        """Whether a process of it has: it answers nothing then, or not for long."""
        return any(process.poll() is not None for process in self._processes)

    def __enter__(self) -> Arm:
        self.begin()
        self.wait()
        return self

    def begin(self) -> None:
        """Starts its processes; `wait` sees them through."""
        (WORK / "logs").mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        if self._discovery is not None:
            threading.Thread(target=self._keep, args=(self._discovery,), daemon=True).start()
        try:
            for place, (command, environment) in enumerate(self._started):
                with (WORK / "logs" / f"{self.name}-{place}.log").open("wb") as log:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=environment_without_graphs() | environment,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            # No session of its own: Linux shares the cores among sessions first, and Dynamo's four
                            # processes that spin, one of each, would take ten times as long for an answer.
                            process_group=0,
                        )
                    )
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Until it has answered a question. Raises RuntimeError where a process ends, or no answer comes: it is then
        closed."""
        try:
            self._until_it_answers()
        except BaseException:
            self.close()
            raise
        self.seconds_to_answer = time.monotonic() - self._began

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def pause(self) -> None:
        """Stops all of its processes where they stand, if they would spin meanwhile."""
        if self.spins:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def processes(self) -> list[psutil.Process]:
        """All that it runs."""
        found: list[psutil.Process] = []
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                one = psutil.Process(process.pid)
                found += [one, *one.children(recursive=True)]
        return found

    def masks(self) -> Counter[tuple[int, ...]]:
        """Cores that a thread may run on → threads of all of its processes that may."""
        found: Counter[tuple[int, ...]] = Counter()
        for process in self.processes():
            with suppress(psutil.Error):
                for thread in process.threads():
                    with suppress(OSError):  # it has ended meanwhile
                        found[tuple(sorted(os.sched_getaffinity(thread.id)))] += 1
        return found

    def close(self) -> None:
        """Ends what was started here: all are asked at once."""
        self._closed.set()
        self.resume()
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            self._end(process)
        self._processes.clear()

    def _until_it_answers(self) -> None:
        # Two tokens: the first of ours comes without a decode worker.
        body = chat("Ready?", [picture(0)] if self._pictures else [], tokens=2) | {"stream": False}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), head)
        end = time.monotonic() + START_SECONDS
        refusal = ""
        while time.monotonic() < end:
            for place, process in enumerate(self._processes):
                if process.poll() is not None:
                    log = WORK / "logs" / f"{self.name}-{place}.log"
                    said = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{self.name}: a process ended ({process.returncode}):\n{said}")
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    self.first_said = json.load(reply)["choices"][0]["message"].get("content") or ""
                return
            except urllib.error.HTTPError as error:
                refusal = f": {error.code} {error.read(200).decode(errors='replace')}"
            except (OSError, HTTPException, ValueError, LookupError):  # not there yet, or not wholly
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} has not answered within {START_SECONDS:g} s{refusal}")

    def _keep(self, discovery: Path) -> None:
        """Until it is closed: Dynamo's file discovery forgets a worker for good whose file nobody has touched for 10 s:
        one that is paused, or finds no core among its own."""
        while not self._closed.wait(KEEP_SECONDS):
            for file in discovery.rglob("*"):
                with suppress(OSError):  # it was withdrawn just now
                    os.utime(file)

    def _signal(self, number: int) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        process.wait()


def agg(model: Path, *, tuned: bool) -> Arm:
    """One ``vllm serve``."""
    port = free_port()
    arguments = [str(model), "--served-model-name", MODEL, "--port", str(port), "--host", "127.0.0.1"]
    more = ["--distributed-executor-backend", "uni", "--disable-uvicorn-access-log"] if tuned else []
    command = [str(BIN / "vllm"), "serve", *arguments, *ENGINE, *more]
    name, environment = ("AGG-tuned", CPU | QUIET | TUNED) if tuned else ("AGG", CPU | QUIET | ONE_THREAD)
    return Arm(name, [(command, environment | named_vllm())], port, spins=not tuned)


def named_vllm() -> dict[str, str]:
    """What ``vllm serve`` needs beside the rest: it asks for the version of a package *vllm*, and ends where that is
    vllm-cpu. Here it is found under the version that vLLM itself makes of vllm-cpu's."""
    with suppress(PackageNotFoundError):
        version("vllm")
        return {}
    number = f"{version('vllm-cpu')}+cpu"
    place = (WORK / "vllm").absolute()
    about = place / f"vllm-{number}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return {"PYTHONPATH": str(place)}


def stock(model: Path, *, tuned: bool) -> Arm:
    """Dynamo's own frontend, encode, prefill and decode workers. Requests go the way that they go by default, over TCP;
    that workers are found by files, and events go over ZeroMQ, saves a server of each."""
    install_stock()
    name = "STOCK-tuned" if tuned else "STOCK"
    port = free_port()
    place = (WORK / f"discovery-{name}-{port}").absolute()
    shared = CPU | QUIET | (TUNED if tuned else ONE_THREAD) | {"PYTHONPATH": str(STOCK.absolute())}
    shared |= {"DYN_FILE_KV": str(place), "DYN_DISCOVERY_BACKEND": "file", "DYN_EVENT_PLANE": "zmq"}
    worker = [sys.executable, "-m", "benchmarks.bounded_stock", "--model", str(model), "--served-model-name", MODEL]
    worker += ENGINE
    worker += ["--enable-multimodal", *(["--distributed-executor-backend", "uni"] if tuned else [])]
    embeds = ["--enable-mm-embeds", "--kv-transfer-config"]
    roles = {
        "encode": ["--disaggregation-mode", "encode"],
        "prefill": [*embeds, _kv("kv_producer"), "--route-to-encoder", "--disaggregation-mode", "prefill"],
        "decode": [*embeds, _kv("kv_consumer"), "--disaggregation-mode", "decode"],
    }
    frontend = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    started: list[Started] = [(frontend, shared)]
    started += [
        ([*worker, *more], shared | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}) for more in roles.values()
    ]
    return Arm(name, started, port, spins=not tuned, discovery=place)


def graph(
    name: str,
    spec: str,
    config: str,
    model: Path,
    *overrides: str,
    pictures: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Arm:
    """One of this project's graphs. ``pictures``: whether it answers questions about them."""
    port = free_port()
    command = [sys.executable, "-m", "dynamo_epd.sdk.cli", "serve", spec, "-f", config, "-p", str(port)]
    command += [f"--Common.model={model}", f"--Common.served-model-name={MODEL}", *overrides]
    own = {"XDG_STATE_HOME": str((WORK / f"state-{name}").absolute())}
    return Arm(name, [(command, own | dict(environment or {}))], port, pictures=pictures)


def ours_agg(model: Path, *overrides: str) -> Arm:
    own = f"--DecodeWorker.kv-cache-memory-bytes={KV_BYTES}"
    return graph("OURS-agg", "graphs.agg:Frontend", "configs/tiny-agg.yaml", model, own, *overrides)


def ours_disagg(
    model: Path, *overrides: str, prefill_workers: int = 1, environment: Mapping[str, str] | None = None
) -> Arm:
    spec, config = "graphs.disagg:Frontend", "configs/tiny-disagg.yaml"
    name = "OURS-disagg"
    if prefill_workers > 1:
        name += f"-{prefill_workers}"
        overrides += (f"--PrefillWorker.ServiceArgs.workers={prefill_workers}",)
    own = [f"--{service}.kv-cache-memory-bytes={KV_BYTES}" for service in ("PrefillWorker", "DecodeWorker")]
    return graph(name, spec, config, model, *own, *overrides, environment=environment)


def install_stock() -> None:
    """Puts ``ai-dynamo`` where only its own arm sees it, once; anew where half of it lies there, or another version.
    Raises CalledProcessError where pip cannot have it."""
    name, pinned = STOCK_PIN.split("==")
    if not (STOCK / f"{name.replace('-', '_')}-{pinned}.dist-info" / "RECORD").is_file():
        shutil.rmtree(STOCK, ignore_errors=True)  # pip replaces nothing that lies there
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(STOCK), STOCK_PIN]
        try:
            subprocess.run(pip, check=True, stdout=sys.stderr)
        except BaseException:  # what it has laid out may look whole
            shutil.rmtree(STOCK, ignore_errors=True)
            raise


def close_all(arms: Collection[Arm]) -> None:
    """Ends them side by side: each takes seconds."""
    if arms:
        with ThreadPoolExecutor(len(arms)) as threads:
            for closed in [threads.submit(arm.close) for arm in arms]:
                closed.result()


def _kv(role: str) -> str:
    about: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    return json.dumps(about)


def environment_without_graphs() -> dict[str, str]:
    """This process' environment without what names a graph, or tells an engine how many threads it has."""
    prefixes = ("DYN_", "DYNAMO_", "VLLM_", "OTEL_", "NATS_", "OMP_", "MKL_", "KMP_", "GOMP_", "TORCH")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def free_port() -> int:
    """Below those that Linux gives to connections: an arm binds it up to a minute later."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
