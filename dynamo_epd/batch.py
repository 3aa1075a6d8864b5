# SPDX-License-Identifier: Apache-2.0
"""``dynamo batch``: a file of prompts in, a directory of pictures with one line each in ``results.jsonl`` out.

What is in the directory is the whole state of a run: a picture is written before its line, both are there whole or not
at all, and the next run on the directory asks only for what has no good line. Nothing else is kept anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import email.utils
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from tqdm import tqdm

from dynamo_epd.errors import EpdError
from dynamo_epd.http.images import MAX_SEED, check_images
from dynamo_epd.http.validations import check_validations
from dynamo_epd.sdk.config import ConfigError

ALL_MATCH, SOME_FAILED, SOME_MISMATCH, INTERRUPTED = 0, 1, 3, 130
"""Exit statuses; 2, for what cannot be run at all, is `ConfigError`'s."""

ATTEMPTS = 10
"""Of one prompt. With the pauses between them they outlast the restart of a worker."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a second attempt, doubled before each further one up to the longest."""
RETRIED = frozenset({408, 429, 502, 503, 504})
CONNECT_SECONDS = 10.0
LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
MAX_CONCURRENCY = 256
MAX_SECONDS = 86400.0
MAX_PROMPTS_BYTES = 64 * 1024 * 1024
MAX_REPLY_BYTES = 64 * 1024 * 1024
MAX_ID = 200
MAX_MESSAGE = 1500

SETTINGS = ("size", "quality", "num_inference_steps", "seed", "threshold", "output_format")
"""Fields of a body that an option gives to every prompt."""
FIELDS = frozenset({*SETTINGS, "model", "guidance_scale", "negative_prompt", "lora", "output_compression"})
"""Fields of a body that a line of JSON may give to its prompt."""


@dataclass(frozen=True)
class Prompt:
    """One wanted picture.

    key: what the prompt and its settings come to; a directory holds at most one result of each.
    id: the line's own, else the key.
    file: the picture's name in the directory.
    body: what is posted, seed included.
    """

    key: str
    id: str
    file: str
    body: dict[str, Any]

    @property
    def name(self) -> str:
        """For a person to read."""
        return plain(self.body["prompt"] if self.id == self.key else self.id)[:80]


def run(arguments: argparse.Namespace) -> int:
    """Carries out ``dynamo batch`` and returns its exit status.

    Raises `ConfigError` for prompts, settings, a directory or a server that nothing can be done with.
    """
    settings = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    if "threshold" in settings and not arguments.validate:
        raise ConfigError("--threshold is for validations, and --images asks for none")
    if not 1 <= arguments.concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"--concurrency must be from 1 to {MAX_CONCURRENCY}")
    if not 0 < arguments.timeout <= MAX_SECONDS:
        raise ConfigError(f"--timeout must be above 0 and at most {MAX_SECONDS:g} seconds")
    try:
        prompts = read_prompts(arguments.prompts, settings, validate=arguments.validate)
        server = Server(
            arguments.url,
            "/v1/validations" if arguments.validate else "/v1/images/generations",
            api_key(arguments.api_key_env),
            seconds=arguments.timeout,
            connections=arguments.concurrency,
        )
        with Results.opened(Path(arguments.output), prompts) as results:
            batch = Batch(prompts, results, server)
            asyncio.run(batch.run(arguments.concurrency))
            return batch.summary()
    except KeyboardInterrupt:  # before or after anything was asked
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def api_key(variable: str | None) -> str | None:
    """The key that an environment variable holds. One that was named must be there; ``OPENAI_API_KEY`` may be."""
    key = os.environ.get(variable or "OPENAI_API_KEY")
    if variable and not key:
        raise ConfigError(f"--api-key-env: the environment has no {plain(variable)}")
    if key and not (key.isascii() and key.isprintable()):  # an HTTP library would say so with the key in its message
        raise ConfigError(f"{plain(variable or 'OPENAI_API_KEY')} holds no API key: it has characters that none has")
    return key


def read_prompts(source: str, settings: Mapping[str, Any], *, validate: bool) -> list[Prompt]:
    """The prompts of a file, or of standard input where ``source`` is ``-``, each with its settings.

    A text file has one prompt a line; JSON lines are taken for such where the name ends in ``.jsonl`` or the first line
    is an object. Empty lines and those that begin with ``#`` are skipped. Raises `ConfigError` with file and line for
    the first thing that no server would take.
    """
    name = "standard input" if source == "-" else source
    lines = [
        (number, line.strip())
        for number, line in enumerate(_text(source, name).split("\n"), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise ConfigError(f"{name}: there is no prompt in it")
    as_json = source.endswith(".jsonl") or lines[0][1].startswith("{")
    seen: Counter[str] = Counter()
    places: dict[str, int] = {}
    prompts = []
    for number, line in lines:
        try:
            fields = json_fields(line) if as_json else {"prompt": line}
            given = fields.pop("id", None)
            if given is not None and places.setdefault(given, number) != number:
                raise ValueError(f"'id' {plain(given)} is that of line {places[given]} already")
            prompts.append(prompt_of(fields, given, settings, seen, validate=validate))
        except (EpdError, ValueError) as error:
            raise ConfigError(f"{name}:{number}: {error}") from error
    return prompts


def _text(source: str, name: str) -> str:
    try:
        with contextlib.ExitStack() as held:
            file: IO[bytes] = sys.stdin.buffer if source == "-" else held.enter_context(open(source, "rb"))
            raw = file.read(MAX_PROMPTS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    if len(raw) > MAX_PROMPTS_BYTES:
        raise ConfigError(f"{name}: it has more than {MAX_PROMPTS_BYTES} bytes; split it")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: it is not UTF-8 (byte {error.start})") from error


def json_fields(line: str) -> dict[str, Any]:
    """The fields of one line of JSON. Raises ValueError."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("a line must be an object with a 'prompt'")
    for name in fields:
        if name not in FIELDS | {"id", "prompt"}:
            raise ValueError(f"'{plain(name)}' is not a field of a prompt; there are id, {', '.join(sorted(FIELDS))}")
    given = fields.get("id")
    if isinstance(given, int) and not isinstance(given, bool):
        fields["id"] = given = str(given)
    if given is not None and not (isinstance(given, str) and 0 < len(given) <= MAX_ID):
        raise ValueError(f"'id' must be a text of 1 to {MAX_ID} characters, or an integer")
    return {name: value for name, value in fields.items() if value is not None}


def prompt_of(
    fields: Mapping[str, Any], given: str | None, settings: Mapping[str, Any], seen: Counter[str], *, validate: bool
) -> Prompt:
    """One prompt. ``seen`` counts what came before: the k-th repeat of a prompt is a picture of its own.

    A seed in the line holds as it is; one that is set for all has the repeat added, as the API does with ``n``; without
    any it follows from the prompt, so that a run that was broken off makes the pictures of an unbroken one.
    """
    body = {**settings, **fields}
    (check_validations if validate else check_images)(body)
    same = digest(validate, given, body)
    repeat = seen[same]
    seen[same] += 1
    key = digest(validate, given, body, repeat)[:16]
    if "seed" not in body:
        body["seed"] = int(digest(given, body["prompt"], repeat)[:8], 16)
    elif "seed" not in fields:
        body["seed"] = (body["seed"] + repeat) % (MAX_SEED + 1)
    name = re.sub(r"[^a-z0-9]+", "-", (given or body["prompt"]).lower())[:40].strip("-")
    file = f"{name}-{key}" if name else key
    return Prompt(key, given or key, f"{file}.{body.get('output_format', 'png')}", body)


def digest(*parts: Any) -> str:
    """Hexadecimal; the same for what is equal as JSON. Raises ValueError for text that is no Unicode."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Results:
    """A directory of pictures and its ``results.jsonl``, held against other runs.

    ``done`` has the lines of this run's prompts that need nothing more, by key.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.lines = directory / "results.jsonl"
        self.done: dict[str, dict[str, Any]] = {}
        self._file = -1

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path, prompts: Sequence[Prompt]) -> Iterator[Results]:
        """Raises `ConfigError` where another run holds the directory, or it holds what no run has written."""
        results = cls(directory)
        with contextlib.ExitStack() as held:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                held.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                results._take_up(prompts)
                results._file = os.open(results.lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                held.callback(os.close, results._file)
            except BlockingIOError as error:
                raise ConfigError(f"{directory}: another run is at work in it") from error
            except OSError as error:
                raise ConfigError(f"{directory}: {error.strerror}") from error
            yield results

    def _take_up(self, prompts: Sequence[Prompt]) -> None:
        """Finds what is done, and drops what a killed run has torn and what failed and will be tried again."""
        for torn in self.directory.glob(".*.part"):
            torn.unlink()
        raw = self.lines.read_bytes() if self.lines.exists() else b""
        wanted = {prompt.key: prompt for prompt in prompts}
        kept = []
        *lines, last = raw.split(b"\n")
        for number, line in enumerate([*lines, last], 1):
            record = _record(line)
            if record is None:
                if line.strip() and number <= len(lines):
                    raise ConfigError(f"{self.lines}:{number}: this is no result of a run; move the file away")
                continue
            prompt = wanted.get(record["key"])
            if prompt is not None:
                if "error" in record or not (self.directory / prompt.file).is_file():
                    continue
                self.done[prompt.key] = record
            kept.append(line + b"\n")
        repaired = b"".join(kept)
        if repaired != raw:
            self._write(self.lines, repaired)

    def add(self, prompt: Prompt, record: Mapping[str, Any], picture: bytes | None = None) -> None:
        """A prompt's line, after its picture. Raises OSError; what was written of a line is then taken back."""
        if picture is not None:
            self._write(self.directory / prompt.file, picture)
        head = {"id": prompt.id, "key": prompt.key, "prompt": prompt.body["prompt"], "seed": prompt.body["seed"]}
        line = json.dumps({**head, **record}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        before = os.fstat(self._file).st_size
        if os.write(self._file, line) < len(line):
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("key"), str) else None


class Failure(Exception):
    """Why there is no picture of a prompt. ``gone``: nobody listens at the server's address."""

    def __init__(self, code: str, message: str, *, status: int | None = None, gone: bool = False):
        super().__init__(message)
        self.gone = gone
        self.error = {"status": status, "code": code, "message": message[:MAX_MESSAGE]}


class Unfinished(Exception):
    """The run ends before a prompt's next attempt."""


Pause = Callable[[float], Any]
"""Awaited between two attempts, with seconds. Raises `Unfinished` where the run ends meanwhile."""


class Server:
    """One route of a graph's frontend, asked again within bounds where another attempt may help."""

    def __init__(self, url: str, route: str, key: str | None, *, seconds: float, connections: int):
        try:
            base = httpx.URL(url.rstrip("/").removesuffix("/v1"))
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {plain(url)}: {error}") from error
        if base.scheme not in ("http", "https") or not base.host:
            raise ConfigError(f"--url {plain(url)}: it must begin with http:// or https:// and name a host")
        self._shown = plain(url)
        self._route = route
        self._seconds = seconds
        self._client = httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # An answer takes what it takes: `seconds` bounds a prompt with all of its attempts.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=connections),
        )

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def check(self) -> None:
        """Posts an empty body, which a graph that has the models refuses for its missing prompt, and nothing else.

        Raises `ConfigError` where no server answers, the key is not taken, or the graph lacks a model.
        """
        try:
            async with asyncio.timeout(2 * CONNECT_SECONDS):
                status, _, raw = await self._post({})
        except (httpx.RequestError, Failure, TimeoutError) as error:
            raise ConfigError(f"{self._shown}: no server answers there ({reason(error)})") from error
        if status == 400 or status in RETRIED:
            return
        raise ConfigError(f"{self._shown}{self._route}: {failure_of(status, raw)}")

    async def ask(self, body: Mapping[str, Any], pause: Pause) -> dict[str, Any]:
        """The first entry of the reply's ``data``. Raises `Failure`, and what ``pause`` raises."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(ends):
                for attempt in range(ATTEMPTS):
                    wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1)
                    try:
                        status, headers, raw = await self._post(body)
                        if status == 200:
                            return entry(raw)
                        failure = failure_of(status, raw)
                        if status not in RETRIED:
                            raise failure
                        wait = max(wait, retry_after(headers.get("retry-after", "")))
                    except httpx.RequestError as error:
                        gone = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                        failure = Failure("connection", f"the connection failed: {reason(error)}", gone=gone)
                    if attempt + 1 == ATTEMPTS or loop.time() + wait > ends:
                        raise failure
                    await pause(wait)
        except TimeoutError:
            raise Failure("timeout", f"no answer within {self._seconds:g} s") from None
        raise AssertionError

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        raw = bytearray()
        async with self._client.stream("POST", self._route, json=body) as reply:
            async for piece in reply.aiter_bytes():
                raw += piece
                if len(raw) > MAX_REPLY_BYTES:
                    raise Failure("reply_too_large", f"the reply has more than {MAX_REPLY_BYTES} bytes")
            return reply.status_code, reply.headers, bytes(raw)


def failure_of(status: int, raw: bytes) -> Failure:
    """What a refusal says: OpenAI's error body, or no more than its status."""
    try:
        error = json.loads(raw)["error"]
        return Failure(str(error.get("code")), plain(str(error["message"])), status=status)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Failure("http", f"the server answers {status}", status=status)


def entry(raw: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(raw)["data"][0]
        found["picture"] = base64.b64decode(found.pop("b64_json"), validate=True)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, binascii.Error) as error:
        raise Failure("unexpected_reply", "the reply is not that of a graph's frontend") from error
    if not found["picture"]:
        raise Failure("unexpected_reply", "the reply's picture is empty")
    return found


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for anything else."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def reason(error: BaseException) -> str:
    return plain(str(error)) or type(error).__name__


def plain(text: str) -> str:
    """One line that says nothing to a terminal but its text."""
    return "".join(one if one.isprintable() else "?" for one in text)


SHOWN = ("size", "caption", "similarity", "threshold", "verdict", "stages")
"""Of a reply, what a line takes over."""


class Batch:
    """One run: what is asked, what came of it, and why it ends."""

    def __init__(self, prompts: Sequence[Prompt], results: Results, server: Server):
        self._results = results
        self._server = server
        self._total = len(prompts)
        self._left = [prompt for prompt in prompts if prompt.key not in results.done]
        self._ended = asyncio.Event()
        self._interrupted = False
        self._failed = 0
        self._made = 0
        self._running = 0
        self._seconds = 0.0
        self._workers: list[asyncio.Task[None]] = []

    async def run(self, concurrency: int) -> None:
        """Asks for everything that is not done, ``concurrency`` prompts at a time."""
        if not self._left:
            return
        async with self._server:
            await self._server.check()
            began = time.monotonic()
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)
            queue = iter(self._left)
            with Progress(self._total, len(self._results.done)) as self._progress:
                async with asyncio.TaskGroup() as group:
                    self._workers = [group.create_task(self._work(queue)) for _ in range(concurrency)]
            self._seconds = time.monotonic() - began

    async def _work(self, queue: Iterator[Prompt]) -> None:
        while not self._ended.is_set() and (prompt := next(queue, None)) is not None:
            self._running += 1
            try:
                await self._one(prompt)
            except Unfinished:
                return
            except OSError as error:
                self._end(f"cannot write to {self._results.directory}: {error.strerror}")
                return
            finally:
                self._running -= 1

    async def _one(self, prompt: Prompt) -> None:
        began = time.monotonic()
        try:
            found = await self._server.ask(prompt.body, self._pause)
        except Failure as failure:
            if failure.gone:  # that says nothing about the prompt, and would be the end of all the others
                self._end(f"the server is gone: {failure}")
                raise Unfinished from failure
            self._results.add(prompt, {"error": failure.error})
            self._failed += 1
            self._progress.say(f"failed: {prompt.name}: {failure}")
        else:
            record = {"file": prompt.file, **{name: found[name] for name in SHOWN if name in found}}
            record["seconds"] = round(time.monotonic() - began, 3)
            self._results.add(prompt, record, found["picture"])
            self._results.done[prompt.key] = record
            self._made += 1
        self._progress.step(self._failed)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
            raise Unfinished

    def _interrupt(self) -> None:
        if self._interrupted:
            for worker in self._workers:
                worker.cancel()
            return
        self._interrupted = True
        self._end(f"interrupted; {self._running} are being finished, Ctrl-C again abandons them")

    def _end(self, why: str) -> None:
        if not self._ended.is_set():
            self._progress.say(why)
        self._ended.set()

    def summary(self) -> int:
        """Prints how it went and returns the exit status that says the same."""
        verdicts = Counter(record.get("verdict") for record in self._results.done.values())
        done = len(self._results.done)
        remain = self._total - done - self._failed
        judged = f" ({verdicts['match']} match, {verdicts['mismatch']} mismatch)" if verdicts.keys() - {None} else ""
        rate = f"; {self._made / self._seconds:.2f} a second" if self._made else ""
        print(f"{self._total} prompts: {done} done{judged}, {self._failed} failed, {remain} remain{rate}")
        print(self._results.lines)
        if remain or self._failed:
            print("the same command again goes on from here: what is done is not asked again", file=sys.stderr)
        if self._interrupted:
            return INTERRUPTED
        if remain or self._failed:
            return SOME_FAILED
        return SOME_MISMATCH if verdicts["mismatch"] else ALL_MATCH


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, done: int):
        # None: no bar where stderr is no terminal.
        self._bar = tqdm(total=total, initial=done, unit="prompt", dynamic_ncols=True, disable=None)
        self._total = total
        self._done = done
        self._said = time.monotonic()
        self.say(f"{total} prompts, {done} done already")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, failed: int) -> None:
        """One more prompt is over."""
        self._done += 1
        if not self._bar.disable:
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.say(f"{self._done} of {self._total}, {failed} failed")

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
