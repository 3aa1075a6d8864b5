# SPDX-License-Identifier: Apache-2.0
"""`dynamo batch` on a real graph, also interrupted; and with a double for what a graph cannot be made to do. Killed:
acceptance/test_batch.py."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynamo_epd import batch
from dynamo_epd.sdk.cli import main
from dynamo_epd.sdk.config import ConfigError
from tests.serving import Graph, at_rest, eventually
from tests.toys.running import ROOT, clean_environment, free_port

PICTURE = (ROOT / "docs" / "star.png").read_bytes()
PROMPTS = [
    "a large red star on a blue background",
    "a small green ring on a yellow background",
    "a large blue square on a white background",
    "a small white circle on a red background",
]
MANY = [f"{prompt} {number}" for number in range(10) for prompt in PROMPTS]
"""More than a run gets through before it is seen to have begun."""

Answer = Callable[[int, dict[str, Any]], Any]


class FaultyFrontendDouble:
    """Speaks two routes of the frontend, and breaks as it is told.

    ``answer`` gets the number of a request, from 0, and its body, and says what happens: ``ok``, ``mismatch``, ``torn``
    (the connection breaks within the reply), ``garbage``, ``hang`` until the end, or (status, headers, body). The empty
    body of the first look does not count.
    """

    def __init__(self, answer: Answer, first_look: int = 400):
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.ended = threading.Event()
        lock = threading.Lock()
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    double.keys.append(self.headers["authorization"])
                    double.paths.append(self.path)
                    number = len(double.bodies)
                    if body:
                        double.bodies.append(body)
                if not body:
                    self.reply(first_look, {}, refusal("this graph has no image model"))
                    return
                told = answer(number, body)
                if told == "hang":
                    double.ended.wait(60)
                    told = "torn"
                if told == "torn":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
                    self.close_connection = True
                elif told == "garbage":
                    self.reply(200, {}, {"data": [{"b64_json": "?"}]})
                elif isinstance(told, tuple):
                    self.reply(*told)
                else:
                    self.reply(200, {}, {"data": [made(body, "mismatch" if told == "mismatch" else "match")]})

            def reply(self, status: int, headers: dict[str, str], body: dict[str, Any]) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(raw))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FaultyFrontendDouble:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def go(self) -> None:
        """Stops listening."""
        self.server.shutdown()
        self.server.server_close()


def made(body: dict[str, Any], verdict: str) -> dict[str, Any]:
    return {
        "seed": body["seed"],
        "b64_json": base64.b64encode(PICTURE).decode(),
        "size": "64x64",
        "caption": body["prompt"],
        "similarity": 1.0,
        "threshold": 0.9,
        "verdict": verdict,
        "stages": [{"name": "image", "queue_seconds": 0.0, "run_seconds": 0.1}],
    }


def refusal(message: str, code: str = "refused") -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@contextlib.contextmanager
def double(answer: Answer, **more: Any) -> Iterator[FaultyFrontendDouble]:
    with FaultyFrontendDouble(answer, **more) as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts that a test can wait for, and no key of the person who runs the tests."""
    monkeypatch.setattr(batch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(batch, "LONGEST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_prompts(directory: Path, *lines: str, name: str = "prompts.txt") -> Path:
    file = directory / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def command(
    *arguments: object, stdin: int | None = None, stderr: int | None = subprocess.PIPE
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dynamo_epd.sdk.cli", "batch", *map(str, arguments)],
        cwd=ROOT,
        env={name: value for name, value in clean_environment().items() if name != "OPENAI_API_KEY"},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, said = process.communicate(timeout=300)
    return process.returncode, out, said


# On a real graph


def test_a_file_of_prompts_is_validated_and_the_exit_status_says_how_it_went(seeing: Graph, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, "# shapes", "", *PROMPTS[:2], f"  {PROMPTS[0]}  ")
    out = tmp_path / "out"
    status, summary, said = finished(command(prompts, "-o", out, "--url", seeing.url))
    found = lines_of(out)
    right = sum(one["verdict"] == "match" for one in found)
    assert right >= 2, found
    assert f"3 prompts: 3 done ({right} match, {3 - right} mismatch), 0 failed, 0 remain" in summary, said
    assert status == (0 if right == 3 else batch.SOME_MISMATCH)
    assert sorted(one["prompt"] for one in found) == sorted([PROMPTS[0], *PROMPTS[:2]])
    for one in found:
        assert Image.open(out / one["file"]).size == (64, 64)
        assert one["caption"]
        assert (one["verdict"] == "match") == (one["similarity"] >= one["threshold"])
        assert [stage["name"] for stage in one["stages"]] == ["image", "caption", "similarity"]
        assert all(stage["run_seconds"] > 0 for stage in one["stages"])
    repeats = [one for one in found if one["prompt"] == PROMPTS[0]]
    assert len({one["seed"] for one in repeats}) == len({(out / one["file"]).read_bytes() for one in repeats}) == 2
    before = (out / "results.jsonl").read_bytes()
    again, summary, _ = finished(command(prompts, "-o", out, "--url", seeing.url))
    assert again == status
    assert (out / "results.jsonl").read_bytes() == before
    at_rest(seeing, 5)


def test_ctrl_c_finishes_what_runs_and_says_what_remains(seeing: Graph, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, *MANY)
    out = tmp_path / "out"
    process = command(prompts, "-o", out, "--concurrency", "2", "--url", seeing.url)
    results = out / "results.jsonl"
    eventually(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2, "two results", 120, 0.01)
    process.send_signal(signal.SIGINT)
    status, summary, said = finished(process)
    assert status == batch.INTERRUPTED, said
    done = lines_of(out)
    assert 2 <= len(done) < len(MANY)
    assert all((out / one["file"]).is_file() and one["verdict"] for one in done)
    assert f"{len(MANY)} prompts: {len(done)} done" in summary
    assert f"0 failed, {len(MANY) - len(done)} remain" in summary
    assert "Ctrl-C again" in said and "the same command again" in said
    assert "Traceback" not in said
    at_rest(seeing, 5)


def test_lines_of_json_from_standard_input_with_ids_and_settings(seeing: Graph, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"id": "star", "prompt": PROMPTS[0], "seed": 7, "num_inference_steps": 4},
        {"id": 12, "prompt": PROMPTS[1], "size": "32x32", "output_format": "webp"},
        {"id": "wrong", "prompt": PROMPTS[2], "size": "no size"},
    ]
    process = command("-", "-o", tmp_path, "--images", "--url", seeing.url, stdin=subprocess.PIPE)
    out, said = process.communicate("\n".join(map(json.dumps, given)), timeout=300)
    assert process.returncode == batch.SOME_FAILED, said
    found = {one["id"]: one for one in lines_of(tmp_path)}
    assert found["star"]["seed"] == 7
    assert found["star"]["file"].startswith("star-") and found["12"]["file"].endswith(".webp")
    assert Image.open(tmp_path / found["12"]["file"]).size == (32, 32)
    assert found["wrong"]["error"]["status"] == 400 and "'size'" in found["wrong"]["error"]["message"]
    assert "file" not in found["wrong"]
    assert "2 done, 1 failed, 0 remain" in out and "failed: wrong: 'size'" in said


# What prompts are


def read(tmp_path: Path, *lines: str, validate: bool = True, name: str = "prompts.txt", **settings: Any) -> list[Any]:
    return batch.read_prompts(str(write_prompts(tmp_path, *lines, name=name)), settings, validate=validate)


def test_a_result_belongs_to_a_prompt_with_its_settings_and_not_to_its_place(tmp_path: Path) -> None:
    one = read(tmp_path, *PROMPTS)
    assert [prompt.body["prompt"] for prompt in one] == PROMPTS
    other = read(tmp_path, *reversed(PROMPTS), "another")
    assert [prompt.key for prompt in other[:4]] == [prompt.key for prompt in reversed(one)]
    assert [prompt.body["seed"] for prompt in other[:4]] == [prompt.body["seed"] for prompt in reversed(one)]
    larger = read(tmp_path, *PROMPTS, size="32x32")
    unjudged = read(tmp_path, *PROMPTS, validate=False)
    assert not {prompt.key for prompt in one} & {prompt.key for prompt in (*larger, *unjudged)}
    assert [prompt.body["seed"] for prompt in larger] == [prompt.body["seed"] for prompt in one]
    assert len({prompt.body["seed"] for prompt in one}) == 4


def test_repeats_are_pictures_of_their_own_and_seeds_hold(tmp_path: Path) -> None:
    drawn = read(tmp_path, PROMPTS[0], PROMPTS[0])
    assert len({prompt.body["seed"] for prompt in drawn}) == len({prompt.file for prompt in drawn}) == 2
    assert [prompt.body["seed"] for prompt in read(tmp_path, *PROMPTS[:2], PROMPTS[0], seed=5)] == [5, 5, 6]
    line = json.dumps({"prompt": PROMPTS[0], "seed": 9})
    assert [prompt.body["seed"] for prompt in read(tmp_path, line, line, seed=5)] == [9, 9]


def test_what_a_line_says_wins_over_an_option(tmp_path: Path) -> None:
    (one,) = read(tmp_path, '{"prompt": "a star", "size": "16x16", "id": null}', size="32x32", quality="low")
    assert (one.body["size"], one.body["quality"]) == ("16x16", "low")


def test_files_are_named_after_prompts_and_stay_in_their_directory(tmp_path: Path) -> None:
    names = [prompt.file for prompt in read(tmp_path, "../../etc/passwd", "Ein Stern!", "星", '"quoted" \\ path')]
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", name) for name in names)
    assert [name.rsplit("-", 1)[0] for name in names[:2]] == ["etc-passwd", "ein-stern"]


@pytest.mark.parametrize(
    ("lines", "place", "message"),
    [
        ([], "", "there is no prompt"),
        (["# nothing", "  "], "", "there is no prompt"),
        (['{"prompt": "a"}', "{"], ":2", "no JSON"),
        (['{"prompt": "a"}', "a star"], ":2", "no JSON"),
        (['{"size": "a"}'], ":1", "'prompt' is required"),
        (['{"prompt": 5}'], ":1", "'prompt' must be a text"),
        (['{"prompt": "a", "sise": "1x1"}'], ":1", "'sise' is not a field"),
        (['{"prompt": "a", "n": 3}'], ":1", "'n' is not a field"),
        (['{"prompt": "a", "seed": -1}'], ":1", "'seed' must be an integer"),
        (['{"prompt": "a", "threshold": NaN}'], ":1", "'threshold' must be a number"),
        (['{"prompt": "a", "id": ""}'], ":1", "'id' must be"),
        (['{"prompt": "a", "id": "x"}', "", '{"prompt": "b", "id": "x"}'], ":3", "'id' x is that of line 1"),
        (['{"prompt": "\\ud800"}'], ":1", "surrogates"),
        (["a" * 40000], ":1", "'prompt' must have"),
    ],
)
def test_what_is_no_prompt_is_named_with_file_and_line(
    lines: list[str], place: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, *lines)
    assert str(refused.value).startswith(f"{tmp_path / 'prompts.txt'}{place}: ")
    assert message in str(refused.value)


def test_a_name_says_that_lines_are_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:1: no JSON"):
        read(tmp_path, "a star", name="prompts.jsonl")


def test_text_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein grüner Stern\r\na\u2028b\r\n".encode())
    assert [one.body["prompt"] for one in batch.read_prompts(str(file), {}, validate=True)] == [
        "ein grüner Stern",
        "a\u2028b",
    ]
    file.write_bytes(b"a star\n\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        batch.read_prompts(str(file), {}, validate=True)


# What cannot be run: exit status 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--concurrency", "0"], "--concurrency must be"),
        (["--timeout", "nan"], "--timeout must be"),
        (["--images", "--threshold", "0.5"], "--threshold is for validations"),
        (["--url", "127.0.0.1:8000"], "must begin with http"),
        (["--url", "ftp://somewhere"], "must begin with http"),
        (["--api-key-env", "NOT_THERE"], "the environment has no NOT_THERE"),
        (["--Frontend.arena-bytes=1"], "a batch takes no configuration"),
        (["--url", f"http://127.0.0.1:{free_port()}"], "no server answers there"),
    ],
)
def test_what_cannot_be_run_is_said(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    assert main(["batch", str(prompts), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


def test_unreadable_prompts_and_directories_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    assert main(["batch", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["batch", str(prompts), "-o", str(prompts)]) == 2
    assert "File exists" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 401, 500, 200])
def test_a_server_that_is_no_graph_with_the_models_is_refused_before_anything_is_asked(
    status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with double(lambda number, body: "ok", first_look=status) as server:
        prompts = write_prompts(tmp_path, *PROMPTS)
        assert main(["batch", str(prompts), "-o", str(tmp_path / "out"), "--url", server.url]) == 2
    assert server.bodies == []
    assert "this graph has no image model" in capsys.readouterr().err


def test_a_key_is_sent_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, PROMPTS[0])
    with double(lambda number, body: "ok") as server:
        arguments = ["batch", str(prompts), "-o", str(tmp_path / "out"), "--url", f"{server.url}/v1/"]
        monkeypatch.setenv("EPD_KEY", "secret")
        assert main([*arguments, "--api-key-env", "EPD_KEY"]) == 0
        assert set(server.keys) == {"Bearer secret"} and set(server.paths) == {"/v1/validations"}
        monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
        assert main(arguments) == 2
    assert "sec" not in capsys.readouterr().err.replace("seconds", "")


# Faults, from a double


def test_what_is_refused_for_now_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    busy = (503, {"retry-after": "0"}, refusal("overloaded"))
    script = [busy, (429, {"retry-after": "not a time"}, refusal("slow down")), "torn", (502, {}, {}), "ok"]
    with double(lambda number, body: script[number]) as server:
        prompts = write_prompts(tmp_path, PROMPTS[0])
        assert main(["batch", str(prompts), "-o", str(tmp_path / "out"), "--url", server.url]) == 0
    assert len(server.bodies) == 5 and all(body == server.bodies[0] for body in server.bodies)
    (line,) = lines_of(tmp_path / "out")
    assert (tmp_path / "out" / line["file"]).read_bytes() == PICTURE


@pytest.mark.parametrize(
    ("told", "asked", "code"),
    [
        ((503, {}, refusal("a storm", "overloaded")), batch.ATTEMPTS, "overloaded"),
        ((503, {"retry-after": "3600"}, refusal("later", "overloaded")), 1, "overloaded"),
        ("torn", batch.ATTEMPTS, "connection"),
        ((400, {}, refusal("no such size", "invalid_request")), 1, "invalid_request"),
        ((500, {}, {}), 1, "http"),
        ("garbage", 1, "unexpected_reply"),
        ("hang", 1, "timeout"),
    ],
)
def test_a_prompt_that_fails_leaves_the_others_and_is_tried_again_by_the_next_run(
    told: Any, asked: int, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    out = tmp_path / "out"
    arguments = ["batch", str(prompts), "-o", str(out)]
    with double(lambda number, body: told if body["prompt"] == PROMPTS[1] else "ok") as server:
        # Within the bound a storm has its attempts, and a pause of an hour does not.
        bound = "1" if told == "hang" else "60"
        assert main([*arguments, "--url", server.url, "--timeout", bound]) == 1
    assert [body["prompt"] for body in server.bodies].count(PROMPTS[1]) == asked
    assert "3 done (3 match, 0 mismatch), 1 failed, 0 remain" in capsys.readouterr().out
    (failed,) = [line for line in lines_of(out) if "error" in line]
    assert failed["prompt"] == PROMPTS[1] and failed["error"]["code"] == code
    assert len(list(out.glob("*.png"))) == 3
    with double(lambda number, body: "ok") as server:
        assert main([*arguments, "--url", server.url]) == 0
    assert [body["prompt"] for body in server.bodies] == [PROMPTS[1]]
    assert len(lines_of(out)) == 4 and not [line for line in lines_of(out) if "error" in line]


def test_a_mismatch_is_told_by_the_exit_status_and_a_failure_outweighs_it(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    tell: dict[str, Any] = {PROMPTS[1]: "mismatch", PROMPTS[2]: (400, {}, refusal("no"))}
    with double(lambda number, body: tell.get(body["prompt"], "ok")) as server:
        arguments = ["batch", str(prompts), "-o", str(tmp_path / "out"), "--url", server.url]
        assert main(arguments) == 1
        tell.pop(PROMPTS[2])
        assert main(arguments) == 3
        assert main(arguments) == 3, "the mismatch of an earlier run counts too"


def test_a_server_that_is_gone_ends_the_run_without_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    out = tmp_path / "out"
    with double(lambda number, body: "ok") as server:

        def answer(number: int, body: dict[str, Any]) -> Any:
            if number == 1:
                threading.Thread(target=dying.go).start()
                return "hang"
            return "ok"

        with double(answer) as dying:
            ended = threading.Timer(1, dying.ended.set)
            ended.start()
            assert main(["batch", str(prompts), "-o", str(out), "--concurrency", "1", "--url", dying.url]) == 1
        said = capsys.readouterr()
        assert "1 done (1 match, 0 mismatch), 0 failed, 3 remain" in said.out
        assert "the server is gone" in said.err
        assert main(["batch", str(prompts), "-o", str(out), "--url", server.url]) == 0
    assert len(server.bodies) == 3


def test_two_runs_on_one_directory_are_refused_and_a_second_ctrl_c_abandons(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    out = tmp_path / "out"
    with double(lambda number, body: "hang" if number else "ok") as server:
        process = command(prompts, "-o", out, "--url", server.url, "--concurrency", "2")
        eventually(lambda: len(server.bodies) == 3, "two that hang", 60)
        status, _, said = finished(command(prompts, "-o", out, "--url", server.url))
        assert status == 2 and "another run is at work in it" in said
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "Ctrl-C again" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        status, summary, said = finished(process)
    assert status == batch.INTERRUPTED
    assert "4 prompts: 1 done (1 match, 0 mismatch), 0 failed, 3 remain" in summary
    assert "Traceback" not in said
    assert len(lines_of(out)) == 1 and len(list(out.glob("*.png"))) == 1


# What a killed run leaves


def complete(tmp_path: Path) -> tuple[list[str], Path, FaultyFrontendDouble]:
    """A finished run of four prompts: its arguments without the server, and its directory."""
    prompts = write_prompts(tmp_path, *PROMPTS)
    out = tmp_path / "out"
    with double(lambda number, body: "ok") as server:
        assert main(["batch", str(prompts), "-o", str(out), "--concurrency", "1", "--url", server.url]) == 0
    return ["batch", str(prompts), "-o", str(out)], out, server


def again(arguments: list[str]) -> list[str]:
    """The prompts that another run asks for."""
    with double(lambda number, body: "ok") as server:
        assert main([*arguments, "--url", server.url]) == 0
    return [body["prompt"] for body in server.bodies]


def test_what_is_done_needs_no_server(tmp_path: Path) -> None:
    arguments, _, _ = complete(tmp_path)
    assert main([*arguments, "--url", f"http://127.0.0.1:{free_port()}"]) == 0


@pytest.mark.parametrize("bytes_left", [1, 40, -2])
def test_a_torn_last_line_is_repaired(bytes_left: int, tmp_path: Path) -> None:
    arguments, out, _ = complete(tmp_path)
    results = out / "results.jsonl"
    *whole, last = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(whole) + last[:bytes_left])
    (out / ".half.png.part").write_bytes(PICTURE[:50])
    assert again(arguments) == [PROMPTS[3]]
    assert results.read_bytes().splitlines(keepends=True)[:3] == whole
    assert len(lines_of(out)) == 4
    assert not list(out.glob(".*.part"))


def test_a_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    arguments, out, _ = complete(tmp_path)
    results = out / "results.jsonl"
    before = results.read_bytes()
    results.write_bytes(before[:-1])
    assert again(arguments) == []
    assert results.read_bytes() == before


def test_a_picture_that_is_missing_is_made_again(tmp_path: Path) -> None:
    arguments, out, _ = complete(tmp_path)
    (out / lines_of(out)[2]["file"]).unlink()
    assert again(arguments) == [PROMPTS[2]]
    assert len(lines_of(out)) == 4


def test_results_of_other_prompts_stay(tmp_path: Path) -> None:
    _, out, _ = complete(tmp_path)
    before = lines_of(out)
    others = write_prompts(tmp_path, "another", PROMPTS[0], name="others.txt")
    assert again(["batch", str(others), "-o", str(out)]) == ["another"]
    assert lines_of(out)[:4] == before


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, out, _ = complete(tmp_path)
    results = out / "results.jsonl"
    theirs = b'{"my": "results"}\n' + results.read_bytes()
    results.write_bytes(theirs)
    assert main(arguments) == 2
    assert "results.jsonl:1: this is no result of a run" in capsys.readouterr().err
    assert results.read_bytes() == theirs


def test_a_full_disk_ends_the_run_with_what_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    out = tmp_path / "out"
    write, left = os.write, [2]

    def write_half_double(file: int, data: bytes) -> int:
        left[0] -= 1
        return write(file, data if left[0] >= 0 else data[: len(data) // 2])

    with double(lambda number, body: "ok") as server:
        arguments = ["batch", str(prompts), "-o", str(out), "--concurrency", "1", "--url", server.url]
        with monkeypatch.context() as patch:
            patch.setattr("dynamo_epd.batch.os.write", write_half_double)
            status = main(arguments)
        assert status == 1
        said = capsys.readouterr()
        assert "cannot write to" in said.err and "No space left" in said.err
        assert "2 done (2 match, 0 mismatch), 0 failed, 2 remain" in said.out
        assert len(lines_of(out)) == 2
        assert main(arguments) == 0


# What a person sees


def test_a_terminal_gets_a_bar_and_nothing_of_a_servers_escapes(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, *PROMPTS)
    nasty: Any = (400, {}, refusal("\x1b[2Jgone\nand more"))
    with double(lambda number, body: nasty if body["prompt"] == PROMPTS[0] else "ok") as server:
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (24, 100))
        process = command(prompts, "-o", tmp_path / "out", "--url", server.url, stderr=theirs)
        os.close(theirs)
        seen = io.BytesIO()
        with contextlib.suppress(OSError):  # the terminal's other end is closed: the command is over
            while piece := os.read(ours, 4096):
                seen.write(piece)
        os.close(ours)
        assert process.wait(60) == 1
        process.communicate()
    text = seen.getvalue().decode()
    assert "4/4" in text and "failed=1" in text
    assert f"failed: {PROMPTS[0]}: ?[2Jgone?and more" in text and "\x1b[2J" not in text


def test_elsewhere_there_are_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch, "LINE_SECONDS", 0.0)
    prompts = write_prompts(tmp_path, *PROMPTS)
    with double(lambda number, body: "ok") as server:
        assert main(["batch", str(prompts), "-o", str(tmp_path / "out"), "--url", server.url]) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.splitlines() == [
        "4 prompts, 0 done already",
        *(f"{number} of 4, 0 failed" for number in range(1, 5)),
    ]
