# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of a graph's front door: bodies of its own OpenAPI document, changed by a seed, for every route with POST.

``python -m tests.hardening.fuzz --url http://127.0.0.1:8000 --count 20000 --seed 7`` against a graph of content
validation. Hypothesis draws fields as the document has them and then the changes: values of a field's own kind and of
any other, its bounds and beyond, addresses of the inside, fields of other routes, of vLLM and of the inside, structure
that is moved, doubled or lost, and at last the bytes. Exit status
1 where a reply was a 5xx, broke off or was no OpenAI error body, or a neighbour was answered wrongly; each with the
body that did it.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Queue
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dynamo_epd.http.body import MAX_TOKENS
from tests.drawing import objects, values
from tests.hardening.edge import CHAT, EMBEDDINGS, EVERY, HOSTS, PREDICT, Entry, Reply, refused
from tests.hardening.files import BOMBS, BROKEN, FOREIGN, ODD, blocks, saved
from tests.picture_server import Canary
from tests.questions import data_url, user

CONNECTIONS = 16
EVERY_SO_MANY = 200
"""Bodies between two questions of a neighbour."""
IDLE = 30.0
"""Seconds after which a connection is made anew: while the next bodies are drawn the server may have closed it."""
BOUND = 120.0
MOST_TOKENS = 8
"""A body may be right after all: then its answer shall be short."""
MOST_STEPS = 2

INSIDE = (
    "image_embeds", "prompt_embeds", "kv_transfer_params", "ec_transfer_params", "cache_salt", "mm_processor_kwargs",
    "media_io_kwargs", "chat_template", "chat_template_kwargs", "priority", "request_id", "uuid", "vllm_xargs",
)  # fmt: skip
"""vLLM takes them, and no document of ours names them: HARDENING.md."""

NUMBERS = st.one_of(
    st.sampled_from(
        (0, 1, -1, 2, 7, 8, 11, 64, 100, 101, 1000, 2**31, 2**63 - 1, 2**63, 10**12, 10**300, 0.5, -0.0, 1e300)
    ),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
)
WORDS = st.sampled_from(
    (
        "", " ", "x", "0", "-1", "null", "true", "auto", "none", "url", "b64_json", "png", "webp", "64x64", "8x8",
        "512x512", "-1x5", "99999x99999", "tiny-llava", "tiny-image", "tiny-t5", "../x", "/etc/passwd", "<image>",
        "data:,", "data:image/png;base64,", "http://frontend/", "file:///etc/passwd", "{{ 7 * 7 }}", "'; --", "\u202e",
        "\U0001f600" * 40, "a large red star on a blue background", "json_schema", "image_url", "user", "tool",
        "\x7f", "\u0000", "x" * 300, "x" * 40_000, "y " * 3000,
    )
)  # fmt: skip
TEXTS = st.one_of(WORDS, st.text(max_size=40))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
Make = Callable[[], bytes]
FILES: tuple[Make, ...] = tuple([*BOMBS.values(), *BROKEN.values(), *FOREIGN.values(), *ODD.values()])
_files: dict[int, str] = {}
SMALL = 200_000
"""Bytes of a file that is sent often."""

SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
RIGHT: tuple[Entry, ...] = (
    *EVERY,
    Entry("chat", CHAT.path, {**CHAT.body, "messages": [user("What is it?", data_url(saved(blocks(), "PNG")))]}),
    Entry("chat", CHAT.path, {**CHAT.body, "stream": True, "stream_options": {"include_usage": True}, "n": 2}),
    Entry(
        "chat",
        CHAT.path,
        {**CHAT.body, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    Entry(
        "chat",
        CHAT.path,
        {
            **CHAT.body,
            "tools": [{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}],
            "tool_choice": "none",
            "stop": ["x"],
            "logit_bias": {"5": 1},
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    Entry("embeddings", EMBEDDINGS.path, {"input": ["a", "b"], "encoding_format": "base64"}),
    Entry("predict", PREDICT.path, {"instances": ["a star"], "parameters": {"num_inference_steps": 1}}),
)
"""Bodies that are answered as they are: each change begins with one of them."""


@dataclass(frozen=True)
class Shot:
    """One request."""

    method: str
    path: str
    body: bytes


class Drawn:
    """What is drawn from one graph's document.

    Args:
        document: ``/openapi.json``.
        port: of the canary. Addresses that lead to it, in every spelling, stand where pictures do and anywhere else.
    """

    def __init__(self, document: Mapping[str, Any], port: int):
        posted = {path: one["post"] for path, one in document["paths"].items() if "post" in one}
        self.schemas: dict[str, Mapping[str, Any]] = {
            path: one["requestBody"]["content"]["application/json"]["schema"]
            for path, one in posted.items()
            if "requestBody" in one
        }
        self.queries = {
            path: {one["name"]: one["schema"] for one in operation["parameters"]}
            for path, operation in posted.items()
            if path not in self.schemas
        }
        self.right = {path: [one for one in RIGHT if _is_of(path, one.path)] for path in self.schemas}
        """Every path needs one: what the document cannot say, as a model's name, is in it."""
        assert all(self.right.values())
        self.fields = sorted({name for _, one in objects(self.schemas) for name in one["properties"]} | set(INSIDE))
        self.urls = st.sampled_from(addresses(port))
        self.texts = st.one_of(TEXTS, self.urls)
        self.values = st.recursive(
            st.one_of(LEAVES, self.urls, self.urls.map(_part_of)),
            lambda inner: st.one_of(
                st.lists(inner, max_size=4),
                st.dictionaries(st.one_of(st.sampled_from(self.fields), TEXTS), inner, max_size=4),
            ),
            max_leaves=8,
        )
        self.own = {
            path: {name: values(one) for name, one in schema["properties"].items()}
            for path, schema in self.schemas.items()
        }

    @property
    def paths(self) -> set[str]:
        """That are shot at, as the document spells them."""
        return self.schemas.keys() | self.queries.keys()


def narrowed(document: Mapping[str, Any], *paths: str) -> dict[str, Any]:
    """The document with these paths alone, for a graph that has no stage behind the others."""
    return {**document, "paths": {path: document["paths"][path] for path in paths}}


def _is_of(template: str, path: str) -> bool:
    head, _, rest = template.partition("{")
    return path.startswith(head) and path.endswith(rest.partition("}")[2]) if rest else path == template


def addresses(port: int) -> list[str]:
    """Where nobody may dial: this machine in every spelling, at ``port``."""
    hosts = [f"http://{host}:{port}/x.png" for host in HOSTS.values()]
    here = f"127.0.0.1:{port}"
    ways = (
        f"https://{here}/x.png", f"HTTP://{here}", f"http://user:word@{here}/", f"http://example.com@{here}/",
        f"http://{here}#@example.com/", f"http://{here}\\@example.com/", f"http:/{here}/", f"http:{here}", f"//{here}/",
        f"ftp://{here}/x", f"ws://{here}/", f"gopher://{here}/_GET", f" http://{here}/", f"http://{here}\r\nX: y",
        f"http%3A%2F%2F127.0.0.1%3A{port}%2F", f"http://127.0.0.1%3A{port}/", f"http://127.0.0.1%2f:{port}/",
        f"http://{here}/redirect?to=http://{here}/", f"http://{here}/%2e%2e/x.png", f"data:image/png,http://{here}/",
    )  # fmt: skip
    return [*hosts, *ways]


def _part_of(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _file(index: int) -> str:
    if index not in _files:
        made = FILES[index]()
        _files[index] = data_url(made if len(made) < SMALL else made[:SMALL])
    return _files[index]


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything below ``value``."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in steps:
        yield (*at, step)
        yield from _places(one, (*at, step))


def _reached(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


@st.composite
def bodies(draw: st.DrawFn, drawn: Drawn) -> Shot:
    """A right body with fields of the document and none to four changes, and at times its bytes changed after that."""
    template = draw(st.sampled_from(sorted(drawn.paths)))
    if template in drawn.queries:
        given_ = {name: draw(st.one_of(values(one), drawn.texts)) for name, one in drawn.queries[template].items()}
        query = urlencode({name: str(value).encode("utf-8", "replace")[:2000] for name, value in given_.items()})
        return Shot("POST", f"{template}?{query}", json.dumps(draw(LEAVES)).encode("utf-8", "surrogatepass"))
    entry = draw(st.sampled_from(range(len(drawn.right[template]))).map(drawn.right[template].__getitem__))
    body: Any = copy.deepcopy(entry.body)
    own = drawn.own[template]
    for name in draw(st.lists(st.sampled_from(sorted(own)), max_size=3)):
        body[name] = draw(own[name])
    if entry.path == CHAT.path and draw(st.integers(0, 9)) == 7:
        body["messages"] = [user("What is it?", draw(drawn.urls))]
    for _ in range(draw(st.integers(0, 4))):
        body = _changed(draw, body, drawn)
    body = _bounded(body)
    raw = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 7:
        raw = _spoilt(draw, raw)
    path = entry.path
    if "{model}" in template and draw(st.integers(0, 9)) == 7:
        path = template.replace("{model}", quote(draw(drawn.texts).encode("utf-8", "replace")[:100], safe=""))
    return Shot("POST", path, raw)


def _changed(draw: st.DrawFn, body: Any, drawn: Drawn) -> Any:
    if not isinstance(body, dict | list) or not body:
        return draw(drawn.values)
    place = _chosen(draw, body)
    holder, step = _reached(body, place[:-1]), place[-1]
    old = holder[step]
    change = draw(st.integers(0, 9))
    if change <= 2:
        holder[step] = draw(_like(old, drawn))
    elif change == 3:
        holder[step] = draw(drawn.values)
    elif change == 4:
        if isinstance(holder, dict):
            holder[draw(st.sampled_from(drawn.fields))] = draw(drawn.values)
        else:
            holder.insert(step, draw(drawn.values))
    elif change == 5:
        del holder[step]
    elif change == 6 and isinstance(holder, dict):
        holder[draw(st.one_of(st.sampled_from(drawn.fields), TEXTS))] = holder.pop(step)
    elif change == 7:
        holder[step] = [old] * draw(st.sampled_from((0, 1, 2, 9, 17, 300 if len(str(old)) < 1000 else 3)))
    elif change == 8:
        other = _reached(body, _chosen(draw, body))
        holder[step] = copy.deepcopy(other)
    else:
        depth = draw(st.sampled_from((1, 3, 70, 130)))
        for _ in range(depth):
            old = [old] if draw(st.booleans()) else {"a": old}
        holder[step] = old
    return body


def _chosen(draw: st.DrawFn, body: Any) -> tuple[Any, ...]:
    """One place below ``body``. By number: Hypothesis writes out what it samples from, and keys may be long."""
    places = list(_places(body))
    return places[draw(st.integers(0, len(places) - 1))]


def _like(old: Any, drawn: Drawn) -> st.SearchStrategy[Any]:
    """Values of the same kind."""
    if isinstance(old, bool):
        return st.booleans()
    if isinstance(old, int | float):
        return NUMBERS
    if isinstance(old, str) and old.startswith("data:"):
        return st.one_of(st.integers(0, len(FILES) - 1).map(_file), drawn.urls)
    if isinstance(old, str):
        return drawn.texts
    return drawn.values


def _bounded(body: Any) -> Any:
    """What would only make a right answer long is cut: the machine's time is for other bodies."""
    if isinstance(body, list):
        return [_bounded(one) for one in body]
    if not isinstance(body, dict):
        return body
    body = {name: _bounded(one) for name, one in body.items()}
    most = {"max_tokens": MOST_TOKENS, "max_completion_tokens": MOST_TOKENS, "num_inference_steps": MOST_STEPS, "n": 2}
    for name, bound in most.items():
        given_ = body.get(name)
        if isinstance(given_, int) and bound < given_ <= MAX_TOKENS:
            body[name] = bound
    if "messages" in body or ("prompt" in body and "max_tokens" in body):
        body["max_tokens"] = MOST_TOKENS if body.get("max_tokens") is None else body["max_tokens"]
    elif "prompt" in body:
        body["num_inference_steps"] = body.get("num_inference_steps") or 1
    return body


def _spoilt(draw: st.DrawFn, raw: bytes) -> bytes:
    at = draw(st.integers(0, len(raw)))
    piece = draw(
        st.sampled_from(
            (b"", b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"}", b"[", b'"', b",", b"\\u0000", b"\\ud800", b"NaN",
             b"1e999",
             b'"a":1,"a":2', b"\xef\xbb\xbf", b"/*", b"[" * 200, b"\\")
        )
    )  # fmt: skip
    return raw[:at] + piece + raw[at + draw(st.sampled_from((0, 0, 1, 5, len(raw)))) :]


AT_ONCE = 1000
"""Shots that are drawn before the first of them is sent: to draw one takes longer than to send it."""


def shots(count: int, number: int, document: Mapping[str, Any], port: int) -> Iterator[Shot]:
    """``count`` requests; the same for the same ``number`` and document, but for the canary's ``port`` in them."""
    drawn = Drawn(document, port)
    for first in range(0, count, AT_ONCE):
        yield from _some(min(AT_ONCE, count - first), number + first, drawn)


def _some(count: int, number: int, drawn: Drawn) -> list[Shot]:
    found: list[Shot] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(drawn))
    def draw(shot: Shot) -> None:
        found.append(shot)

    rounds = 0
    while len(found) < count:  # Hypothesis ends early where it believes to have seen all
        draw()
        rounds += 1
        draw = seed(number + rounds)(draw)
    return found[:count]


@dataclass
class Report:
    """What came of a run."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    slowest_shot: str = ""
    """What was asked of which route, and what came of it."""
    seconds: float = 0.0

    def __str__(self) -> str:
        total = sum(self.statuses.values())
        shares = ", ".join(f"{status}: {number}" for status, number in sorted(self.statuses.items()))
        took = f"{total} bodies in {self.seconds:.0f} s ({shares})"
        return f"{took}; slowest {self.slowest:.1f} s; {len(self.faults)} faults"


class Fuzzer:
    """Sends shots over `CONNECTIONS` connections that are kept open, and judges every reply."""

    def __init__(self, url: str, canary: Callable[[], object], headers: Mapping[str, str] | None = None):
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._canary = canary
        self._headers = {"content-type": "application/json", **(headers or {})}
        self.report = Report()
        self._lock = threading.Lock()

    def run(self, shots: Iterable[Shot], say: Callable[[str], object] = lambda text: None) -> Report:
        """``canary`` is called every `EVERY_SO_MANY` shots, while others are under way; what it raises is a fault.
        ``say`` is told every `AT_ONCE` shots how far it is."""
        began = time.monotonic()
        waiting: Queue[Shot | None] = Queue(2 * CONNECTIONS)
        threads = [threading.Thread(target=self._work, args=(waiting,), daemon=True) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for index, shot in enumerate(shots):
            waiting.put(shot)
            if index % EVERY_SO_MANY == 0:
                self._ask()
            if index % AT_ONCE == 0:
                self.report.seconds = time.monotonic() - began
                with self._lock:
                    say(str(self.report))
        for _ in threads:
            waiting.put(None)
        for thread in threads:
            thread.join()
        self._ask()
        self.report.seconds = time.monotonic() - began
        return self.report

    def _ask(self) -> None:
        try:
            self._canary()
        except Exception as error:  # a neighbour's trouble of any kind is what is looked for
            self._fault(f"a neighbour: {type(error).__name__}: {error}"[:500])

    def _fault(self, text: str) -> None:
        with self._lock:
            self.report.faults.append(text)

    def _work(self, waiting: Queue[Shot | None]) -> None:
        connection = http.client.HTTPConnection(*self._address, timeout=BOUND)
        used = time.monotonic()
        while (shot := waiting.get()) is not None:
            began = time.monotonic()
            if began - used > IDLE:
                connection.close()
            try:
                connection.request(shot.method, shot.path, shot.body, self._headers)
                answer = connection.getresponse()
                named = {name.lower(): value for name, value in answer.getheaders()}
                reply = Reply(answer.status, named, answer.read(), time.monotonic() - began)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._fault(f"no reply ({type(error).__name__}) to {shot.path} {shot.body[:2000]!r}")
                continue
            finally:
                used = time.monotonic()
            with self._lock:
                self.report.statuses[reply.status] += 1
                if reply.seconds > self.report.slowest:
                    self.report.slowest = reply.seconds
                    self.report.slowest_shot = f"{shot.path} {shot.body[:2000]!r}: {reply.status} {reply.body[:300]!r}"
            try:
                fault = judged(reply)
            except Exception as error:  # a thread that ended of it would leave the others' work undone
                fault = f"a reply that cannot be judged ({type(error).__name__}: {error}) {reply.body[:300]!r}"
            if fault:
                self._fault(f"{fault}: {shot.path} {shot.body[:2000]!r}")
        connection.close()


def judged(reply: Reply) -> str | None:
    """What is wrong with a reply, if anything: it must be an answer, or a refusal in OpenAI's form."""
    if reply.status in (200, 202):
        streamed = reply.headers["content-type"].startswith("text/event-stream")
        return _fault_of_stream(reply) if streamed else _fault_of_answer(reply)
    if reply.status == 503 and "retry-after" in reply.headers:
        return None if b"overloaded" in reply.body else f"503 {reply.body[:300]!r}"  # a bound was reached, as it should
    if reply.status >= 500:
        return f"{reply.status} {reply.body[:300]!r}"
    try:
        refused(reply, (400, 404, 413, 415, 422, 431))
    except (AssertionError, ValueError, KeyError) as error:
        return f"no refusal of ours ({str(error)[:300]})"
    return None


def _fault_of_answer(reply: Reply) -> str | None:
    try:
        found = json.loads(reply.body)
    except ValueError:
        return f"{reply.status} that is no JSON {reply.body[:300]!r}"
    return f"{reply.status} with an error {reply.body[:300]!r}" if "error" in found else None


LAST = ("image_generation.completed", "validation.similarity")
"""What ends a stream beside chat that went well; one of chat ends in ``[DONE]``."""


def _fault_of_stream(reply: Reply) -> str | None:
    """It goes on to its end, or says why not in an error event; the reason may be the client or a bound."""
    *whole, rest = reply.body.split(b"\n\n")
    lines = [line[6:] for event in whole for line in event.split(b"\n") if line.startswith(b"data: ")]
    if rest or not lines:
        return f"a stream that breaks off {reply.body[-300:]!r}"
    done = lines[-1] == b"[DONE]"
    try:
        events = [json.loads(line) for line in (lines[:-1] if done else lines)]
    except ValueError:
        return f"a stream with an event that is no JSON {reply.body[-300:]!r}"
    errors = [index for index, event in enumerate(events) if "error" in event]
    if not errors:
        ended = done or events[-1].get("type") in LAST
        return None if ended else f"a stream without an end {reply.body[-300:]!r}"
    if done or errors != [len(events) - 1]:
        return f"a stream that goes on after an error {reply.body[-300:]!r}"
    if b'"overloaded_error"' in lines[-1]:
        return None
    try:
        refused(Reply(400, {"content-type": "application/json"}, lines[-1], reply.seconds), 400)
    except (AssertionError, ValueError, KeyError) as fault:
        return f"an error in a stream ({str(fault)[:300]})"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--key", help="an API key, where the graph wants one")
    arguments = parser.parse_args()
    headers = {"authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    fuzzer = Fuzzer(arguments.url, canary(arguments.url, headers), headers)
    with Canary() as dialled:
        report = fuzzer.run(
            shots(arguments.count, arguments.seed, document_of(arguments.url, headers), dialled.port), print
        )
        if count := dialled.dialled():
            report.faults.append(f"an address of the inside was dialled {count} times")
    print(f"seed {arguments.seed}: {report}")
    for fault in report.faults[:20]:
        print(fault)
    return 1 if report.faults else 0


def document_of(url: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the graph says of itself."""
    with urlopen(Request(f"{url}/openapi.json", headers=dict(headers or {})), timeout=BOUND) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def canary(url: str, headers: Mapping[str, str]) -> Callable[[], object]:
    """A question whose answer must stay what it was at first."""
    from tests.questions import post

    body = {**CHAT.body, "messages": [user("Describe the picture.", data_url(saved(blocks(64, 64), "PNG")))]}

    def asked() -> str:
        reply = post(f"{url}{CHAT.path}", body, 120, **headers)
        return str(reply["choices"][0]["message"]["content"])

    first = asked()

    def again() -> None:
        assert asked() == first

    return again


if __name__ == "__main__":
    sys.exit(main())
