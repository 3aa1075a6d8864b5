# SPDX-License-Identifier: Apache-2.0
"""A real S3 server process on this machine, moto's, with one bucket. It keeps objects in its memory only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import boto3

START_SECONDS = 60.0
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
"""For the environment of whoever uses the server."""
REGION = "us-east-1"
_PROGRAM = "import sys; sys.setswitchinterval(60); from moto.server import main; main(sys.argv[1:])"
"""``python -m moto.server``, but for one thing: moto looks whether a key is there and then writes it, in two steps that
its threads interleave, where S3 does it in one. With this its threads change places only where they wait."""


class S3Server:
    """One server. ``endpoint`` is its address, also after `start` has started it again, empty."""

    def __init__(self, bucket: str = "pictures"):
        self.bucket = bucket
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers and has its bucket."""
        assert self._process is None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, "-H", "127.0.0.1", "-p", str(self.port)],
            env=os.environ | CREDENTIALS,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, "moto's server has ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            assert time.monotonic() < end, "moto's server does not answer"
            time.sleep(0.05)
        self.client().create_bucket(Bucket=self.bucket)

    def client(self):
        """boto3's, to look at what is there without the store."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def pause(self) -> None:
        """It takes connections and answers nothing, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Nothing listens afterwards."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def s3_server(bucket: str = "pictures") -> Iterator[S3Server]:
    """A server that is up. Whoever asks it needs `CREDENTIALS` in the environment."""
    server = S3Server(bucket)
    try:
        server.start()
        yield server
    finally:
        server.kill()
