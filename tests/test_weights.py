# SPDX-License-Identifier: Apache-2.0
"""Weights from ``s3://``, against a real server process. Pictures of what was downloaded are those of the original."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dynamo_epd import weights
from tests.s3_server import CREDENTIALS, REGION, S3Server, s3_server
from tests.serving import eventually, untrained
from tests.toys.running import ROOT

MODEL = "s3://pictures/models/flux"
ASK = """
import logging, sys
from dynamo_epd import weights
logging.basicConfig(level="INFO", format="%(message)s")
weights.CHUNK = int(sys.argv[2])
print(weights.local(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as one:
        for path in untrained("flux").rglob("*"):
            if path.is_file():
                put(one, f"models/flux/{path.relative_to(untrained('flux'))}", path.read_bytes())
        put(one, "models/flux-2/config.json", b"{}")
        for name in ("weights.bin", "run.py", "state.pkl", "README.md"):
            put(one, f"models/flux/{name}", b"not to be taken")
        yield one


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, as the environment names it. What is downloaded goes into ``tmp_path``."""
    settings = CREDENTIALS | {"AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": REGION}
    for name, value in (settings | {"DYNAMO_WEIGHTS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(weights, "ATTEMPTS", 2)
    return server


def put(server: S3Server, key: str, data: bytes) -> None:
    server.client().put_object(Bucket=server.bucket, Key=key, Body=data)


def asked(model: str, chunk: int = weights.CHUNK) -> subprocess.Popen[str]:
    """Another worker that wants the model."""
    return subprocess.Popen(
        [sys.executable, "-c", ASK, model, str(chunk)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(directory: Path | str) -> dict[str, bytes]:
    found = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def test_directories_and_names_on_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    for name in (str(tmp_path), "models/tiny/t5", "black-forest-labs/FLUX.1-dev", "gpt2"):
        assert weights.local(name) == name


def test_a_prefix_is_downloaded_once(bucket: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    directory = weights.local(MODEL)
    original = files(untrained("flux"))
    assert files(directory) == {name: data for name, data in original.items() if name.endswith(weights.TAKEN)}
    assert "downloaded" in caplog.text
    caplog.clear()
    assert weights.local(f"{MODEL}/") == directory
    assert caplog.text == ""


def test_only_what_is_wanted_is_downloaded(bucket: S3Server) -> None:
    directory = weights.local(MODEL, lambda path: path.startswith("vae/"))
    assert {name.partition("/")[0] for name in files(directory)} == {"vae"}
    assert weights.local(MODEL) == directory
    assert "model_index.json" in files(directory)


def test_a_picture_with_t5_elsewhere_both_from_the_bucket(bucket: S3Server, tmp_path: Path) -> None:
    from dynamo_epd.diffusion.generator import Generator, Wanted
    from dynamo_epd.diffusion.text_encoder import Conditioning, Row
    from dynamo_epd.text.t5 import TextEncoder

    wanted = Wanted("a large red star on a blue background", 1, 64, 64, steps=2)

    def made(generator: Generator) -> np.ndarray:
        return generator.generate(wanted, lambda *_: None, threading.Event()).pixels.astype(int)

    def ask(row: Row) -> Conditioning:
        return Conditioning(encoder.encode([list(row.ids)])[0].states, b"")

    generator = Generator(MODEL, ask=ask)
    here = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert here == {"transformer", "vae", "text_encoder"}, "T5 is elsewhere"
    encoder = TextEncoder(MODEL)
    here = {path.parent.name for path in tmp_path.rglob("*.safetensors")}
    assert here == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    expected = made(Generator(str(untrained("flux"))))
    assert np.abs(made(generator) - expected).max() <= 1
    np.testing.assert_array_equal(made(Generator(MODEL)), expected)


def test_two_workers_download_once(bucket: S3Server) -> None:
    put(bucket, "models/two/model.safetensors", os.urandom(4_000_000))
    workers = [asked("s3://pictures/models/two", chunk=100_000) for _ in range(2)]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum("downloaded" in log for _, log in said) == 1


@pytest.mark.parametrize("changed", [False, True], ids=["same", "changed meanwhile"])
def test_a_killed_download_goes_on_where_it_was(bucket: S3Server, tmp_path: Path, changed: bool) -> None:
    data = os.urandom(20_000_000)
    put(bucket, "models/large/model.safetensors", data)
    worker = asked("s3://pictures/models/large", chunk=50_000)
    begun = eventually(lambda: [one for one in tmp_path.rglob("*.part") if one.stat().st_size > 100_000], "begun", 60)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    (part,) = begun
    assert part.stat().st_size < len(data)
    assert not list(tmp_path.rglob("*.safetensors"))
    with part.open("r+b") as file:
        file.write(b"mark")  # shows whether these bytes are downloaded again
    if changed:
        data = data[::-1]
        put(bucket, "models/large/model.safetensors", data)
    found = files(weights.local("s3://pictures/models/large"))["model.safetensors"]
    assert found == (data if changed else b"mark" + data[4:])


def test_a_new_version_of_a_prefix_has_a_place_of_its_own(bucket: S3Server) -> None:
    put(bucket, "models/new/config.json", b"1")
    first = weights.local("s3://pictures/models/new")
    put(bucket, "models/new/config.json", b"2")
    second = weights.local("s3://pictures/models/new")
    assert (files(first), files(second)) == ({"config.json": b"1"}, {"config.json": b"2"})


def test_an_empty_file_is_a_file(bucket: S3Server) -> None:
    put(bucket, "models/empty/added.json", b"")
    assert files(weights.local("s3://pictures/models/empty")) == {"added.json": b""}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("s3://pictures/models/none", "nothing under this prefix"),
        ("s3://pictures/models/fl", "nothing under this prefix"),
        ("s3://nowhere/models/flux", "no such bucket"),
        ("s3://pictures", "is not s3://BUCKET/PREFIX"),
        ("s3://pictures/", "is not s3://BUCKET/PREFIX"),
        ("s3://", "is not s3://BUCKET/PREFIX"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_line(bucket: S3Server, name: str, says: str) -> None:
    with pytest.raises(weights.WeightsError, match=says) as caught:
        weights.local(name)
    assert "\n" not in str(caught.value)


class Relay:
    """A fault that a whole server does not have: a network that cuts the first connections."""

    def __init__(self, port: int, cut: int):
        self._to = port
        self._cut = cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._cut > 0:
                self._cut -= 1
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with source, target:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()


def test_a_broken_connection_is_tried_again(
    bucket: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(bucket.port, cut=3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
    monkeypatch.setattr(weights, "ATTEMPTS", 4)
    assert files(weights.local(MODEL, lambda path: path.startswith("vae/")))
    assert "trying again" in caplog.text
    relay.close()


def test_without_the_bucket_what_was_downloaded_before_is_taken(
    bucket: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    relay = Relay(bucket.port, cut=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.endpoint)
    directory = weights.local(MODEL, lambda path: path.startswith("vae/"))
    monkeypatch.setattr(weights, "ATTEMPTS", 1)
    relay.close()
    assert weights.local(MODEL, lambda path: path.startswith("vae/")) == directory
    assert "taking what was downloaded before" in caplog.text
    with pytest.raises(weights.WeightsError):
        weights.local(MODEL)


def test_a_full_disk_is_said_before_the_download(bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = weights.shutil.disk_usage("/")
    full_disk = lambda path: usage._replace(free=1000)  # noqa: E731 # a double: no test fills a disk
    monkeypatch.setattr(weights.shutil, "disk_usage", full_disk)
    with pytest.raises(weights.WeightsError, match="1000 are free"):
        weights.local(MODEL)
