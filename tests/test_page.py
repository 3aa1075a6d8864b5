# SPDX-License-Identifier: Apache-2.0
"""The page at ``/ui``: in a real browser on a whole graph, and piece by piece. Pictures may be noise here."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import numpy as np
import psutil
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from starlette.types import Message, Receive, Scope, Send

from dynamo_epd.page import cards
from dynamo_epd.page.door import AT_ONCE, OPEN, Door, make_room, names_only_uploads
from dynamo_epd.page.runs import Runs, Stopped
from tests.questions import post
from tests.serving import Graph, at_rest, eventually
from tests.toys.running import ROOT, Served

STAR = "a large red star on a blue background"
RING = "a small green ring on a yellow background"
CHROMIUM = shutil.which("chromium")
PATIENCE = 120_000
"""Milliseconds; the machine may be busy."""


# --- in a browser, on the whole graph


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(seeing: Graph, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The open page. Whatever a test does with it: it asks no other host, and its console stays clean."""
    asked: list[str] = []
    ended: list[str] = []
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))

    def names_came() -> bool:
        opened.wait_for_timeout(20)
        return any("/queue/data" in url for url in ended)

    # The page breaks their stream off when it has all of it, or the server ends it, whichever is sooner.
    for event in ("requestfinished", "requestfailed"):
        opened.on(event, lambda request: ended.append(request.url))
    opened.goto(f"{seeing.url}/ui")
    eventually(names_came, "the names of the models: what is unfolded after them stays as it is set", 60)
    opened.get_by_label("Prompt").wait_for()
    yield opened
    said = list(complaints)  # what is under way when a browser is closed breaks off
    context.close()
    elsewhere = [url for url in asked if not url.startswith((f"{seeing.url}/", "data:", "blob:"))]
    assert asked
    assert elsewhere == []
    if "leaving" not in request.node.name:  # Gradio complains that its streams break off
        assert said == []


def option(page: Page, label: str, value: Any) -> None:
    """Opens the options where they are folded away, and sets one."""
    field = page.locator("#epd-options").get_by_label(label)
    if not field.is_visible():
        page.get_by_role("button", name="Options").first.click()
    fill_in(field, str(value))


def fill_in(field: Locator, value: str) -> None:
    """Fills the field as a person would: Gradio takes what was typed into a field in the moment it unfolds back."""

    def kept() -> bool:
        field.fill(value)
        field.press("Tab")
        field.page.wait_for_timeout(300)
        return field.input_value() == value

    eventually(kept, f"{value} stays in its field", 60)


def status(page: Page) -> Locator:
    return page.locator("#epd-status")


def test_a_validation_fills_in_stage_by_stage(seeing: Graph, page: Page) -> None:
    page.evaluate(
        """() => {
            window.order = [];
            const shown = {image: "#epd-picture img.made", caption: "#epd-caption .said",
                           similarity: "#epd-similarity .verdict"};
            new MutationObserver(() => {
                for (const [stage, selector] of Object.entries(shown))
                    if (document.querySelector(selector) && !window.order.includes(stage)) window.order.push(stage);
            }).observe(document.body, {childList: true, subtree: true});
        }"""
    )
    option(page, "Seed", 5)
    option(page, "Threshold", 0.5)
    page.get_by_label("Prompt").fill(STAR)
    page.keyboard.press("Enter")
    expect(page.locator("#epd-similarity .verdict")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("window.order") == ["image", "caption", "similarity"]

    (one,) = post(f"{seeing.url}/v1/validations", {"prompt": STAR, "seed": 5, "threshold": 0.5})["data"]
    expect(page.locator("#epd-caption .said")).to_have_text(one["caption"] or "(nothing)")
    word = one["verdict"].capitalize()
    expect(page.locator("#epd-similarity .verdict")).to_contain_text(word)
    expect(page.locator("#epd-similarity .verdict")).to_contain_text(f"{one['similarity']:.3f}")
    expect(status(page)).to_contain_text(word)
    picture = page.locator("#epd-picture img")
    assert shown_file(seeing, picture) == base64.b64decode(one["b64_json"])
    assert STAR in (picture.get_attribute("alt") or "")

    expect(page.locator("#epd-times tbody i.run")).to_have_count(3)
    rows = page.locator("#epd-times tbody tr")
    assert [row.split()[0] for row in rows.all_inner_texts()] == ["Picture", "Caption", "Similarity"]
    assert all(row.count("ms") == 2 for row in rows.all_inner_texts())
    strips = page.locator("#epd-vectors img.strip")
    expect(strips).to_have_count(3)
    names = [str(strip.get_attribute("alt")).split(":")[0] for strip in strips.all()]
    assert names == ["Prompt", "Caption", "Difference"]
    assert page.locator("footer").count() == 0


def shown_file(graph: Graph, picture: Locator) -> bytes:
    """The bytes that a picture of the page shows, inline or at its address."""
    source = str(picture.get_attribute("src"))
    with urllib.request.urlopen(urljoin(f"{graph.url}/ui/", source), timeout=30) as reply:
        return bytes(reply.read())


def test_an_example_fills_the_prompt(page: Page) -> None:
    page.get_by_role("button", name=RING).click()
    expect(page.get_by_label("Prompt")).to_have_value(RING)
    expect(page.get_by_label("Prompt")).to_be_focused()


@pytest.mark.parametrize("way", ["button", "Escape", "leaving"])
def test_a_run_that_is_cancelled_is_over_in_the_graph_too(seeing: Graph, page: Page, way: str) -> None:
    before = seeing.metrics("ImageWorker").total("epd_denoise_step_seconds_count")
    pictures = seeing.metrics("ImageWorker").total("epd_images_generated_total")
    option(page, "Denoise steps", 100)
    option(page, "Size", "512x512")
    page.get_by_label("Prompt").fill(STAR)
    page.keyboard.press("Enter")
    steps = lambda: seeing.metrics("ImageWorker").total("epd_denoise_step_seconds_count") - before  # noqa: E731
    eventually(lambda: steps() > 0, "the first denoise step", 120)
    if way == "leaving":
        page.goto("about:blank")
    elif way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Cancel").click()
    if way != "leaving":
        expect(status(page)).to_contain_text("Cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
    at_rest(seeing, 30)
    assert steps() < 100
    assert seeing.metrics("ImageWorker").total("epd_images_generated_total") == pictures


def test_a_refusal_says_what_to_do_and_the_page_goes_on(page: Page) -> None:
    option(page, "Denoise steps", 101)
    page.get_by_label("Prompt").fill(STAR)
    page.keyboard.press("Enter")
    failure = page.get_by_role("alert")
    expect(failure).to_contain_text("num_inference_steps")
    expect(failure).to_contain_text("Change num_inference_steps")
    option(page, "Denoise steps", "four")
    page.get_by_role("button", name="Validate", exact=True).click()
    expect(failure).to_contain_text("must be a whole number")
    option(page, "Denoise steps", 4)
    page.get_by_role("button", name="Validate", exact=True).click()
    expect(page.locator("#epd-similarity .verdict")).to_be_visible(timeout=PATIENCE)
    expect(failure).to_have_count(0)
    page.get_by_label("Prompt").fill("   ")
    page.keyboard.press("Enter")
    expect(failure).to_contain_text("There is no prompt")


def say(page: Page, text: str) -> Locator:
    """Sends a message; the answers so far."""
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    return page.locator("#epd-chat .bot .message-content, #epd-chat .bot .prose")


def test_a_chat_sees_pictures_in_every_turn(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.set_input_files("#epd-message input[type=file]", ROOT / "docs" / "star.png")
    page.locator("#epd-message img").wait_for()
    say(page, "Describe the picture.")
    chat = page.locator("#epd-chat")
    expect(chat).to_contain_text(STAR)
    expect(page.locator("#epd-stop")).to_be_disabled()
    expect(chat.locator("img").first).to_be_visible()
    say(page, "Describe the picture.")
    eventually(lambda: chat.inner_text().count(STAR) == 2, "the second answer, of the first turn's picture", 60)
    page.get_by_role("button", name="Options").last.click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-llava")
    page.get_by_role("button", name="New conversation").click()
    expect(chat).not_to_contain_text(STAR)


def test_a_refused_message_comes_back_into_the_box(page: Page) -> None:
    page.get_by_role("tab", name="Chat").click()
    page.get_by_role("button", name="Options").last.click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("tiny-llava")
    fill_in(page.get_by_label("Longest answer"), "9999999999")
    say(page, "What is it?")
    expect(page.get_by_role("alert")).to_contain_text("max_tokens")
    expect(page.get_by_label("Message", exact=True)).to_have_value("What is it?")
    fill_in(page.get_by_label("Longest answer"), "8")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.locator("#epd-stop")).to_be_disabled()
    expect(page.locator("#epd-chat")).to_contain_text("What is it?")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_the_gallery_shows_the_newest_result_first(seeing: Graph, page: Page) -> None:
    for prompt in (STAR, RING):
        post(f"{seeing.url}/v1/validations", {"prompt": prompt, "seed": 3, "response_format": "url"})
    page.get_by_role("tab", name="Gallery").click()
    results = page.locator("#epd-gallery").get_by_role("listitem")
    expect(results.nth(1)).to_be_visible()
    for index, prompt in enumerate((RING, STAR)):
        expect(results.nth(index)).to_contain_text(prompt)
        expect(results.nth(index)).to_contain_text(re.compile(r"(Match|Mismatch) \d\.\d{3}"))
        picture = results.nth(index).get_by_role("img")
        assert prompt in (picture.get_attribute("alt") or "")
        assert shown_file(seeing, picture).startswith(b"\x89PNG")
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") == 64


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.type(STAR)
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
    names = [name for name, _ in reached]
    names = [name.split("\n")[0] for name in names]  # the accordion adds its arrow
    for name in ("Validate", STAR, RING, "Options"):
        assert name in names, reached
    assert names.index("Validate") < names.index(STAR) < names.index("Options")
    assert all(outlined for name, outlined in reached if name in (STAR, RING, "Validate")), reached
    while not page.evaluate(FOCUSED)[0].startswith("Options"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Denoise steps")).to_be_visible()
    page.get_by_label("Denoise steps").focus()
    page.keyboard.type("2")
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#epd-similarity .verdict")).to_be_visible(timeout=PATIENCE)
    page.get_by_role("tab", name="Validate").focus()
    for tab in ("Chat", "Gallery"):
        page.keyboard.press("Tab" if page.evaluate(FOCUSED)[0] != tab else "Shift")
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")


FOCUSED = """() => {
    const element = document.activeElement, style = getComputedStyle(element);
    return [(element.getAttribute("aria-label") || element.innerText || element.value || "").trim(),
            style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_needs_no_sideways_scrolling(seeing: Graph, browser: Browser, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    small = context.new_page()
    small.set_default_timeout(PATIENCE)
    small.goto(f"{seeing.url}/ui")
    small.get_by_label("Prompt").fill(STAR)
    small.keyboard.press("Enter")
    expect(small.locator("#epd-similarity .verdict")).to_be_visible(timeout=PATIENCE)
    for tab in ("Validate", "Chat", "Gallery"):
        small.get_by_role("tab", name=tab).click()
        assert small.evaluate("document.documentElement.scrollWidth") == 390
    ground = small.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(number) for number in re.findall(r"\d+", ground)[:3])
    assert (lightness > 600) == (scheme == "light")
    context.close()


def test_the_frontend_talks_to_this_machine_only(seeing: Graph, page: Page) -> None:
    process = psutil.Process(seeing.pid("Frontend"))
    peers = {connection.raddr.ip for connection in process.net_connections("inet") if connection.raddr}
    assert peers <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


# --- by the service, without a model


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("paged")
    (home / "tmp").mkdir()
    arguments = ("tests.toys.paged:Door", "--Door.ServiceArgs.workers=2")
    with Served(home / "state", *arguments, TMPDIR=str(home / "tmp")) as served:
        served.wait_until_up()
        eventually(lambda: ask(served, "GET", "/ui/")[0] == 200, "the page", 120)
        yield served


def ask(served: Served, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, str]:
    """One request over a connection of its own: the kernel picks the worker."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request(method, path, body, {"content-type": kind})
        reply = connection.getresponse()
        return reply.status, reply.read().decode(errors="replace")
    finally:
        connection.close()


def form(data: bytes, name: str = "a.png") -> tuple[bytes, str]:
    head = f'--edge\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def joined(served: Served, session: str, index: int, *data: Any) -> str:
    body = {"data": list(data), "fn_index": index, "session_hash": session}
    code, text = ask(served, "POST", "/ui/gradio_api/queue/join", json.dumps(body).encode())
    assert code == 200, text
    code, text = ask(served, "GET", f"/ui/gradio_api/queue/data?session_hash={session}")
    assert code == 200, text
    return text


def test_workers_that_share_a_port_show_one_page(toys: Served) -> None:
    code, text = ask(toys, "GET", "/ui/config")
    assert code == 200
    (load,) = [one for one in json.loads(text)["dependencies"] if any(target[1] == "load" for target in one["targets"])]
    names = set()
    for turn in range(12):
        found = joined(toys, f"turn{turn}", load["id"])
        assert '"success":true' in found
        names |= set(re.findall(r"worker-\d", found))
    assert names, "the page asked the graph, by whichever worker took its request"


def test_ctrl_c_does_not_wait_for_open_pages(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "DYNAMO_DRAIN_SECONDS": "600"}
    with Served(tmp_path / "state", "tests.toys.paged:Door", **environment) as served:
        served.wait_until_up()
        eventually(lambda: ask(served, "GET", "/ui/")[0] == 200, "the page", 120)
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/ui/gradio_api/heartbeat/one", timeout=60) as open_:
            assert open_.readline() == b"data: ALIVE\n"
            assert served.stop() == 0
            open_.read()
        assert served.processes() == []
        assert list((tmp_path / "tmp").glob("dynamo-ui-*")) == []


def test_the_document_names_no_other_host(toys: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", toys.port, timeout=60)
    connection.request("GET", "/ui/")
    reply = connection.getresponse()
    text = reply.read().decode()
    assert "default-src 'self'" in (reply.getheader("content-security-policy") or "")
    connection.close()
    served = re.sub(r"window\.gradio_(config|api_info) = .*?</script>", "", text)
    assert set(re.findall(r"https?://[\w.]+", served)) <= {"http://www.w3.org", "http://127.0.0.1"}
    labels = re.findall(r'"label":"(Validate|Chat|Gallery)"', text)
    assert labels == ["Chat"], "a graph without image worker has the chat alone"


def test_what_the_page_does_not_need_is_closed(toys: Served) -> None:
    for method, path in (
        ("GET", "/ui/gradio_api/file=http://127.0.0.1:1/x"),
        ("GET", "/ui/gradio_api/file=/etc/passwd"),
        ("GET", "/ui/gradio_api/file%3D/etc/passwd"),
        ("GET", "/ui/gradio_api/proxy=http://127.0.0.1:1/x"),
        ("GET", "/ui/gradio_api/openapi.json"),
        ("GET", "/ui/gradio_api/deep_link?session_hash=x"),
        ("GET", "/ui/monitoring"),
        ("GET", "/ui/static/../../../../etc/passwd"),
        ("GET", "/ui/static/%2e%2e/%2e%2e/routes.py"),
        ("POST", "/ui/gradio_api/run/predict"),
        ("POST", "/ui/gradio_api/call/predict"),
        ("POST", "/ui/gradio_api/component_server"),
        ("POST", "/ui/gradio_api/process_recording"),
        ("PUT", "/ui/"),
    ):
        assert ask(toys, method, path)[0] in (403, 404), path
    code, text = ask(toys, "GET", "/ui/gradio_api/info")
    assert code == 200
    assert json.loads(text) == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_uploads_are_bounded_and_come_back_only_from_their_place(toys: Served) -> None:
    data, kind = form(b"x" * 1000)
    code, text = ask(toys, "POST", "/ui/gradio_api/upload", data, kind)
    assert code == 200
    (path,) = json.loads(text)
    assert ask(toys, "GET", f"/ui/gradio_api/file={path}") == (200, "x" * 1000)
    assert ask(toys, "GET", f"/ui/gradio_api/file={Path(path).parents[2]}/page.sock")[0] == 403
    data, kind = form(b"x" * (1024 * 1024 + 1))
    assert ask(toys, "POST", "/ui/gradio_api/upload", data, kind)[0] == 413
    address = {"path": "http://127.0.0.1:1/x.png", "meta": {"_type": "gradio.FileData"}}
    join = {"data": [{"text": "", "files": [address]}], "fn_index": 0, "session_hash": "s"}
    assert ask(toys, "POST", "/ui/gradio_api/queue/join", json.dumps(join).encode())[0] == 400
    join["data"] = ["x" * 300_000]
    assert ask(toys, "POST", "/ui/gradio_api/queue/join", json.dumps(join).encode())[0] == 413


# --- piece by piece


def event(stage: str, **fields: Any) -> dict[str, Any]:
    return {"stage": {"name": stage, "queue_seconds": 0.01, "run_seconds": 0.2}, "seed": 1, **fields}


def test_texts_of_models_and_clients_are_shown_as_texts() -> None:
    evil = "<img src=x onerror=alert(1)>'\""
    report = cards.Report(evil, "running")
    report.add(event("image", b64_json="'><script>", output_format=evil, size=evil))
    report.add(event("caption", caption=evil))
    shown = "".join(report.cards().values()) + report.status() + cards.failure(evil, evil)
    shown += cards.gallery([{"id": evil, "prompt": evil, "caption": evil, "size": evil, "url": "javascript:x"}], "h", 0)
    assert "<script" not in shown
    assert "<img src=x" not in shown
    assert "javascript" not in shown


def test_a_picture_that_is_kept_is_shown_by_its_address() -> None:
    report = cards.Report(STAR, "running", "here:1")
    report.add(event("image", id="a", url="http://127.0.0.1:5/v1/images/a", output_format="png", size="64x64"))
    assert "src='../v1/images/a'" in report.cards()["picture"]


def test_strips_say_where_two_vectors_differ() -> None:
    one = np.zeros(200, np.float32)
    one[3], one[150] = 0.5, -0.5
    other = one.copy()
    other[150] = -0.4
    text = cards.strips(one.tolist(), other.tolist())
    assert "in dimension 151" in text
    assert "200 values from -0.50 to 0.50" in text
    pixels = np.asarray(Image.open(file_of(text, 0)))
    assert pixels.shape == (2, cards.COLUMNS, 4)
    assert tuple(pixels[0, 3]) == (*cards.POSITIVE, 255)
    assert tuple(pixels[1, 150 - cards.COLUMNS]) == (*cards.NEGATIVE, 255)
    assert pixels[0, 0, 3] == 0
    difference = np.asarray(Image.open(file_of(text, 2)))
    assert np.count_nonzero(difference[..., 3]) == 1


def file_of(text: str, index: int) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(re.findall(r"base64,([^']+)'", text)[index]))


def test_a_verdict_is_a_word_too() -> None:
    low = {"similarity": -0.2, "threshold": 0.9, "verdict": "mismatch"}
    assert "Mismatch" in cards.verdict(low)
    assert "width:0.0%" in cards.verdict(low)
    assert "Match" in cards.verdict({"similarity": 0.95, "threshold": 0.9, "verdict": "match"})


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        ({"id": "a", "url": "/v1/images/a"}, "../v1/images/a"),
        ({"id": "a", "url": "http://here:1/v1/images/a?signature=b"}, "../v1/images/a?signature=b"),
        ({"id": "a b", "url": "https://elsewhere/bucket/a"}, "../v1/images/a%20b"),
        ({"id": "a"}, "../v1/images/a"),
    ],
)
def test_pictures_are_taken_from_this_host(one: dict[str, Any], wanted: str) -> None:
    assert cards.address(one, "here:1") == wanted


def test_only_paths_name_files() -> None:
    assert names_only_uploads(b'{"data": [{"files": [{"path": "/tmp/a/b.png", "url": "http://x/"}]}]}')
    for path in ('"http://x/y"', '"//x/y"', '"/a//b"', '"file:///etc"', '"a.png"', "5", '{"path": "ftp://x"}'):
        assert not names_only_uploads(f'{{"data": [{{"path": {path}}}]}}'.encode()), path
    assert not names_only_uploads(b"{")
    assert not names_only_uploads(b"[" * 100_000)


def test_the_door_names_routes_in_full() -> None:
    assert OPEN.fullmatch("GET /")
    assert not OPEN.fullmatch("GET /gradio_api/queue/data/x")
    assert not OPEN.fullmatch("GET /gradio_api/file=http://x")
    assert not OPEN.fullmatch("POST /gradio_api/run/x")


def test_the_oldest_uploads_make_room(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    make_room(tmp_path, 20, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older"]
    make_room(tmp_path, 20, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_uploads_of_nothing_make_room_too_with_their_directories(tmp_path: Path) -> None:
    for age in range(5):
        (tmp_path / str(age)).mkdir()
        (tmp_path / str(age) / "empty").touch()
        os.utime(tmp_path / str(age) / "empty", (1000 - age, 1000 - age))
    make_room(tmp_path, 20, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_streams_without_an_end_have_a_bound() -> None:
    """Each is a connection and a task for as long as its client likes."""

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        door, statuses = Door(endless, Path("/nowhere")), list[int]()

        async def send(message: Message) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "method": "GET", "path": "/gradio_api/heartbeat/x", "headers": []}
        running = [asyncio.create_task(door(scope, None, send)) for _ in range(AT_ONCE)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert statuses == []
        await door(scope, None, send)  # type: ignore[arg-type]
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert door._running == 0
        assert statuses[0] == 503

    run(main())


def run(work: Coroutine[Any, Any, None]) -> None:
    """In a thread: the browser's driver has a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


def test_a_run_that_is_stopped_closes_what_it_follows() -> None:
    closed = []

    async def source() -> AsyncGenerator[int, None]:
        try:
            for number in range(3):
                yield number
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    found = []

    async def stopped() -> None:
        runs = Runs()
        async for numbers in runs.follow("session", "tab", source()):
            found.extend(numbers)
            if len(found) == 3:
                runs.stop("another")
                runs.stop("session")

    with pytest.raises(Stopped):
        run(stopped())
    assert found == [0, 1, 2]
    assert closed == [True]


def test_a_run_passes_on_what_its_source_raises() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        raise LookupError

    found = []

    async def followed() -> None:
        async for numbers in Runs().follow("session", "tab", source()):
            found.extend(numbers)

    with pytest.raises(LookupError):
        run(followed())
    assert found == [1]
