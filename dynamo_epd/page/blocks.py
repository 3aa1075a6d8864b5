# SPDX-License-Identifier: Apache-2.0
"""The page's tabs and what their buttons do. Each function asks the graph over HTTP and shows what it says."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dynamo_epd.http.auth import key_of
from dynamo_epd.page import cards
from dynamo_epd.page.graph_api import GraphApi, Refused, Visitor
from dynamo_epd.page.runs import Runs, Stopped

EXAMPLES = ("a large red star on a blue background", "a small green ring on a yellow background")
MAX_PROMPT = 4000
"""Characters that the page takes of one text; the API takes more."""
MAX_TURNS = 64
"""Of one conversation, questions and answers together."""
GALLERY = 24
FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif"]
MIME = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
QUEUE = 64
"""Clicks that may wait; one more is told so."""
AT_ONCE = 16
"""Runs of one kind side by side; the graph has bounds of its own."""
CHAT_HINT = "Ask about a picture: drop or paste one, or press the paper clip.\nSeveral turns keep their pictures."


class Tabs:
    """Builds the Blocks. ``tabs``: those of "validate", "chat" and "gallery" for which the graph has the stages."""

    def __init__(self, graph: GraphApi, *, tabs: Sequence[str], sizes: Sequence[str] = ()):
        self._graph = graph
        self._runs = Runs()
        self._tabs = tabs
        self._sizes = [name for name in sizes if name != "default"]

    def blocks(self) -> gr.Blocks:
        """The whole page. Files that nobody needs any more are looked for every ten minutes."""
        with gr.Blocks(title="dynamo-epd", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
            _html("epd-header", self._header())
            with gr.Tabs(elem_id="epd-tabs"):
                if "validate" in self._tabs:
                    with gr.Tab("Validate", id="validate"):
                        self._validate_tab()
                if "chat" in self._tabs:
                    with gr.Tab("Chat", id="chat"):
                        model = self._chat_tab()
                    page.load(self._models, None, model, show_progress="hidden", api_visibility="private")
                if "gallery" in self._tabs:
                    with gr.Tab("Gallery", id="gallery") as gallery:
                        self._gallery_tab(gallery)
            page.unload(self._left)
        # Gradio looks for work a thousand times a second otherwise, on the loop that serves chats.
        page.queue(max_size=QUEUE, default_concurrency_limit=AT_ONCE, api_open=False)
        page._queue.sleep_when_free = 0.05
        page._queue.progress_update_sleep_when_free = 0.5
        page.state_session_capacity = 256
        for function in page.fns.values():
            function.api_visibility = "private"
        return page

    def _header(self) -> str:
        steps = ("prompt", "picture", "caption", "similarity")
        line = " → ".join(steps) if "validate" in self._tabs else "images and text in, text out"
        return f"<header class='epd-header'><h1>dynamo-epd</h1><p>{line}</p></header>"

    # --- validate

    def _validate_tab(self) -> None:
        with gr.Row(elem_classes="epd-go"):
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="What the picture shall show",
                lines=1,
                max_lines=1,
                max_length=MAX_PROMPT,
                autofocus=True,
                scale=5,
                elem_id="epd-prompt",
            )
            with gr.Column(scale=1, min_width=150, elem_classes="epd-buttons"):
                go = gr.Button("Validate", variant="primary", elem_id="epd-validate")
                cancel = gr.Button("Cancel", interactive=False, elem_id="epd-cancel", elem_classes="epd-cancel")
        with gr.Row(elem_classes="epd-examples"):
            for text in EXAMPLES:
                example = gr.Button(text, size="sm", scale=0)
                example.click(None, None, prompt, js=f"() => {{ {_focus('epd-prompt')} return {text!r}; }}")
        with gr.Accordion("Options", open=False, elem_id="epd-options"), gr.Row():
            size = gr.Dropdown(
                ["default", *self._sizes],
                value="default",
                allow_custom_value=True,
                label="Size",
                info="a name, or WIDTHxHEIGHT",
            )
            # Text fields: Gradio's number fields make a nought of nothing.
            steps = gr.Textbox(label="Denoise steps", info="empty: the model's own", max_lines=1)
            seed = gr.Textbox(label="Seed", info="empty: drawn at random", max_lines=1)
            threshold = gr.Textbox(label="Threshold", info="empty: the graph's own", max_lines=1)
        status = _html("epd-status", cards.Report().status())
        failure = _html("epd-failure")
        with gr.Row(elem_id="epd-results"):
            with gr.Column(scale=2, min_width=260):
                picture = _html("epd-picture")
            with gr.Column(scale=3, min_width=300):
                caption = _html("epd-caption")
                similarity = _html("epd-similarity")
                times = _html("epd-times")
        vectors = _html("epd-vectors")
        outputs = [status, failure, cancel, picture, caption, similarity, vectors, times]
        gr.on(
            [go.click, prompt.submit],
            self._validate,
            [prompt, size, steps, seed, threshold],
            outputs,
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
            trigger_mode="once",
        )
        cancel.click(self._stop_validation, None, None, show_progress="hidden", concurrency_limit=AT_ONCE)

    async def _validate(
        self,
        prompt: str | None,
        size: str | None,
        steps: str | None,
        seed: str | None,
        threshold: str | None,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        report = cards.Report((prompt or "").strip(), "running", _host(request))
        if not report.prompt:
            report.state = "idle"
            yield _shown(report, cards.failure("There is no prompt.", "Type what the picture shall show."))
            return
        failure = ""
        yield _shown(report)
        try:
            body = {
                "prompt": report.prompt,
                "size": None if size == "default" else size or None,
                "num_inference_steps": _number("Denoise steps", steps, int),
                "seed": _number("Seed", seed, int),
                "threshold": _number("Threshold", threshold, float),
            }
            source = self._graph.validate(_visitor(request), body)
            async for events in self._runs.follow(_session(request), "validate", source):
                for event in events:
                    report.add(event)
                if report.current:
                    yield _shown(report)
            if report.current:
                raise Refused("The graph's answer broke off.", "Try again.")
            report.state = "done"
        except Stopped:
            report.state = "stopped"
        except Refused as refused:
            report.state = "failed" if report.events else "idle"
            failure = cards.failure(refused.message, refused.advice)
        yield _shown(report, failure)

    async def _stop_validation(self, request: gr.Request) -> None:
        self._runs.stop(_session(request), "validate")

    # --- chat

    def _chat_tab(self) -> gr.Dropdown:
        chatbot = gr.Chatbot(
            label="Conversation",
            height=460,
            buttons=["copy"],
            feedback_options=None,
            placeholder=CHAT_HINT,
            latex_delimiters=[],
            allow_file_downloads=False,
            allow_tags=False,
            layout="bubble",
            elem_id="epd-chat",
        )
        failure = _html("epd-chat-failure")
        message = gr.MultimodalTextbox(
            label="Message",
            show_label=False,
            placeholder="Ask something …",
            file_types=FILE_TYPES,
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=MAX_PROMPT,
            elem_id="epd-message",
        )
        with gr.Row(elem_classes="epd-chat-buttons"):
            stop = gr.Button("Stop", size="sm", interactive=False, elem_id="epd-stop", elem_classes="epd-cancel")
            clear = gr.Button("New conversation", size="sm", elem_id="epd-clear")
        with gr.Accordion("Options", open=False), gr.Row():
            model = gr.Dropdown([], label="Model", allow_custom_value=True, elem_id="epd-model")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: always the likeliest word")
            tokens = gr.Textbox("256", label="Longest answer", info="tokens; empty: as long as may be", max_lines=1)
        turns = gr.State([], time_to_live=3600)
        gr.on(
            [message.submit],
            self._chat,
            [message, turns, model, temperature, tokens],
            [message, chatbot, failure, stop, turns],
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
            trigger_mode="once",
        )
        stop.click(self._stop_chat, None, None, show_progress="hidden", concurrency_limit=AT_ONCE)
        clear.click(
            self._new_chat,
            None,
            [message, chatbot, failure, turns],
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
        )
        return model

    async def _models(self, request: gr.Request) -> Any:
        try:
            names = await self._graph.chat_models(_visitor(request))
        except Refused:  # the first message will say why
            return gr.skip()
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    async def _chat(
        self,
        message: dict[str, Any],
        turns: list[dict[str, Any]],
        model: str | None,
        temperature: float,
        tokens: str | None,
        request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        text, files = (message.get("text") or "").strip(), list(message.get("files") or [])
        if not text and not files:
            yield gr.skip(), gr.skip(), cards.failure("The message is empty.", "Write something."), gr.skip(), gr.skip()
            return
        asked = {"role": "user", "text": text or "Describe the picture.", "files": files}
        answer: dict[str, Any] = {"role": "assistant", "text": "", "files": []}
        now = [*turns, asked]
        locked, idle = gr.Button(interactive=True), gr.Button(interactive=False)
        yield gr.MultimodalTextbox(value=None), _bubbles(now, "…"), "", locked, gr.skip()
        failure = ""
        try:
            if len(now) > MAX_TURNS:
                raise Refused("The conversation is too long.", "Begin a new one.")
            body = {
                "model": model or None,
                "messages": await asyncio.to_thread(_messages, now),
                "temperature": temperature,
                "max_tokens": _number("Longest answer", tokens, int),
            }
            source = self._graph.chat(_visitor(request), body)
            async for pieces in self._runs.follow(_session(request), "chat", source):
                answer["text"] += "".join(pieces)
                yield gr.skip(), _bubbles([*now, answer]), gr.skip(), gr.skip(), gr.skip()
        except Stopped:
            answer["text"] += " (stopped)"
        except Refused as refused:
            # The question comes back into the box, to be changed or sent again.
            failure = cards.failure(refused.message, refused.advice)
            yield message, _bubbles(turns), failure, idle, turns
            return
        done = [*now, answer]
        yield gr.skip(), _bubbles(done), "", idle, done

    async def _stop_chat(self, request: gr.Request) -> None:
        self._runs.stop(_session(request), "chat")

    async def _new_chat(self, request: gr.Request) -> tuple[Any, ...]:
        self._runs.stop(_session(request), "chat")
        return None, [], "", []

    # --- gallery

    def _gallery_tab(self, tab: gr.Tab) -> None:
        refresh = gr.Button("Refresh", size="sm", elem_id="epd-refresh", scale=0)
        results = _html("epd-gallery")
        gr.on(
            [tab.select, refresh.click],
            self._gallery,
            None,
            results,
            show_progress="hidden",
            concurrency_limit=AT_ONCE,
        )

    async def _gallery(self, request: gr.Request) -> str:
        try:
            found = await self._graph.past_results(_visitor(request), GALLERY)
        except Refused as refused:
            if refused.status in (404, 405):
                return "<p class='epd-empty'>This graph keeps no results.</p>"
            return cards.failure(refused.message, refused.advice)
        return cards.gallery(found, _host(request), time.time())

    async def _left(self, request: gr.Request) -> None:
        """The browser is gone: what it had asked for is not needed any more."""
        self._runs.stop(_session(request))


def _html(element: str, value: str = "") -> gr.HTML:
    """HTML of ours, in our own style."""
    return gr.HTML(value, elem_id=element, apply_default_css=False, padding=False, elem_classes="epd-html")


def _shown(report: cards.Report, failure: str = "") -> tuple[Any, ...]:
    """The outputs of the validate tab, in their order."""
    found = report.cards()
    cancel = gr.Button(interactive=report.state == "running")
    names = ("picture", "caption", "similarity", "vectors", "times")
    return report.status(), failure, cancel, *(found[name] for name in names)


def _number(name: str, text: str | None, kind: type[int] | type[float]) -> float | None:
    """None for an empty field, and for one that was never unfolded. The bounds are the graph's to check."""
    try:
        return kind(text) if text and text.strip() else None
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise Refused(f"{name} must be {wanted}.", "Change it, or leave it empty.") from error


def _bubbles(turns: Sequence[dict[str, Any]], waiting: str = "") -> list[dict[str, Any]]:
    """The conversation as Gradio's Chatbot takes it."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        for index, path in enumerate(turn["files"], start=1):
            found.append({"role": turn["role"], "content": {"path": path, "alt_text": f"Picture {index} of a message"}})
        found.append({"role": turn["role"], "content": turn["text"]})
    if waiting:
        found.append({"role": "assistant", "content": waiting})
    return found


def _messages(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as OpenAI's API takes it, with every turn's pictures."""
    messages = []
    for turn in turns:
        content: list[dict[str, Any]] = []
        for path in turn["files"]:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise Refused(
                    "A picture of this conversation is not kept any more.", "Begin a new conversation."
                ) from error
            kind = MIME.get(Path(path).suffix.lower(), "png")
            url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        text = turn["text"]
        messages.append(
            {"role": turn["role"], "content": [*content, {"type": "text", "text": text}] if content else text}
        )
    return messages


def _visitor(request: gr.Request) -> Visitor:
    assert request.request is not None
    base = str(request.request.scope["dynamo_epd.graph"])  # see `Page`
    return Visitor(base, key_of(request.headers.get("authorization")))


def _host(request: gr.Request) -> str:
    return str(request.headers.get("host", ""))


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


def _focus(element: str) -> str:
    return f"document.querySelector('#{element} textarea, #{element} input').focus();"
