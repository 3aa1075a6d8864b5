# SPDX-License-Identifier: Apache-2.0
"""What the page shows of a validation and of past results, as HTML. Every text of a client or a model is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, quote, urlsplit

if TYPE_CHECKING:
    import numpy

STAGES = ("image", "caption", "similarity")
TITLES = {"image": "Picture", "caption": "Caption", "similarity": "Similarity"}
DOING = {
    "image": "Making the picture …",
    "caption": "Describing the picture …",
    "similarity": "Comparing caption and prompt …",
}
COLUMNS = 128
"""Values of a vector beside each other; longer ones go on in the next row."""
NEGATIVE, POSITIVE = (37, 99, 186), (217, 95, 2)
"""Of the strips: apart for colour-blind eyes too, and on a light and a dark ground."""
FORMATS = ("png", "webp", "jpeg")


@dataclass
class Report:
    """One validation as far as it has come. ``state`` is idle, running, done, stopped or failed."""

    prompt: str = ""
    state: str = "idle"
    host: str = ""
    """Where the browser is, as it names it."""
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage, as the graph sent them."""

    def add(self, event: dict[str, Any]) -> None:
        self.events[event["stage"]["name"]] = event

    @property
    def current(self) -> str | None:
        """The stage that is being waited for."""
        return next((stage for stage in STAGES if stage not in self.events), None) if self.state == "running" else None

    def status(self) -> str:
        """One line that says where it stands."""
        if self.state == "running":
            place = STAGES.index(self.current) if self.current else len(STAGES) - 1
            doing = escape(DOING[STAGES[place]])
            return f"<p class='epd-status running'><span class='dot'></span>{doing} ({place + 1} of {len(STAGES)})</p>"
        if self.state == "stopped":
            return "<p class='epd-status'>Cancelled. What had been finished by then is shown.</p>"
        if self.state == "done":
            found = self.events["similarity"]
            total = sum(sum(_seconds(event)) for event in self.events.values())
            verdict = f"{found['verdict'].capitalize()}, similarity {found['similarity']:.3f}"
            return f"<p class='epd-status'>{verdict}, in {_duration(total)}.</p>"
        return "<p class='epd-status'></p>"

    def cards(self) -> dict[str, str]:
        """HTML by card: picture, caption, similarity, vectors, times."""
        if self.state == "idle":
            return dict.fromkeys(("picture", "caption", "similarity", "vectors", "times"), "")
        similarity = self.events.get("similarity")
        return {
            "picture": _card("Picture", self._picture(), "picture"),
            "caption": _card("Caption", self._caption(), "caption"),
            "similarity": _card("Similarity", verdict(similarity) if similarity else self._waiting("similarity")),
            "vectors": _card("Embeddings", self._vectors(), "vectors"),
            "times": _card("Time per stage", times(self.events, self.current), "times"),
        }

    def _waiting(self, stage: str) -> str:
        if self.state != "running":
            return "<p class='none'>not reached</p>"
        if stage == self.current:
            return f"<div class='waiting active'>{escape(DOING[stage])}</div>"
        return "<div class='waiting'>waits for its turn</div>"

    def _picture(self) -> str:
        event = self.events.get("image")
        if event is None:
            return self._waiting("image")
        kind = event.get("output_format") if event.get("output_format") in FORMATS else "png"
        file = event.get("b64_json")
        source = f"data:image/{kind};base64,{escape(file, quote=True)}" if file else address(event, self.host)
        alt = escape(f"Picture made from the prompt: {self.prompt}", quote=True)
        facts = escape(f"{event.get('size', '')} · seed {event.get('seed')}")
        return f"<img class='made' src='{source}' alt='{alt}'><p class='facts'>{facts}</p>"

    def _caption(self) -> str:
        event = self.events.get("caption")
        if event is None:
            return self._waiting("caption")
        return (
            f"<p class='said'>{escape(event['caption']) or '<i>(nothing)</i>'}</p>"
            f"<p class='facts'>asked for: {escape(self.prompt)}</p>"
        )

    def _vectors(self) -> str:
        event = self.events.get("similarity")
        if event is None:
            return self._waiting("similarity")
        if not event.get("prompt_embedding"):
            return "<p class='none'>This graph sent none.</p>"
        return strips(event["prompt_embedding"], event["caption_embedding"])


def failure(message: str, advice: str) -> str:
    """What went wrong, and what to do."""
    return (
        "<div class='epd-failure' role='alert'><strong><span aria-hidden='true'>⚠</span> "
        f"{escape(message)}</strong><p>{escape(advice)}</p></div>"
    )


def verdict(event: Mapping[str, Any]) -> str:
    """A word, a sign and a scale: nothing is said by colour alone."""
    similarity, threshold = float(event["similarity"]), float(event["threshold"])
    match = event["verdict"] == "match"
    word, sign = ("Match", "✓") if match else ("Mismatch", "✗")
    relation = "at or above" if match else "below"
    return (
        f"<p class='verdict {'match' if match else 'mismatch'}'><span class='sign' aria-hidden='true'>{sign}</span>"
        f"<span>{word}</span><span class='number'>{similarity:.3f}</span></p>"
        f"<div class='scale' aria-hidden='true'><i class='filled' style='width:{_percent(similarity)}%'></i>"
        f"<i class='tick' style='left:{_percent(threshold)}%'></i></div>"
        f"<p class='facts'>cosine similarity, {relation} the threshold of {threshold:g}</p>"
    )


def times(events: Mapping[str, Mapping[str, Any]], current: str | None) -> str:
    """A table whose bars stack queue and run time, in milliseconds."""
    seconds = {stage: _seconds(event) for stage, event in events.items()}
    longest = max([sum(both) for both in seconds.values()], default=0) or 1
    rows = []
    for stage in STAGES:
        if stage in seconds:
            queue, run = seconds[stage]
            bar = (
                f"<i class='queue' style='width:{queue / longest * 100:.2f}%'></i>"
                f"<i class='run' style='width:{run / longest * 100:.2f}%'></i>"
            )
            numbers = f"<td>{_ms(queue)}</td><td>{_ms(run)}</td>"
        else:
            bar = "<i class='open'></i>" if stage == current else ""
            numbers = "<td>&ndash;</td><td>&ndash;</td>"
        rows.append(
            f"<tr><th scope='row'>{TITLES[stage]}</th><td class='bar' aria-hidden='true'><div>{bar}</div></td>"
            f"{numbers}</tr>"
        )
    total = sum(sum(both) for both in seconds.values())
    return (
        "<table class='times'><thead><tr><th scope='col'>Stage</th><td aria-hidden='true'></td>"
        "<th scope='col'><i class='key queue' aria-hidden='true'></i>Queue</th>"
        "<th scope='col'><i class='key run' aria-hidden='true'></i>Run</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody>"
        f"<tfoot><tr><th scope='row'>Total</th><td></td><td colspan='2'>{_ms(total)}</td></tr></tfoot></table>"
    )


def strips(prompt: Sequence[float], caption: Sequence[float]) -> str:
    """Both vectors and their difference, one under the other, in one scale of colour."""
    import numpy as np

    one, other = np.asarray(prompt, np.float32), np.asarray(caption, np.float32)
    difference = other - one
    most = float(max(np.abs(one).max(), np.abs(other).max())) or 1.0
    widest = int(np.abs(difference).argmax())
    rows = -(-len(one) // COLUMNS)
    height = 30 if rows == 1 else max(2 * rows, min(8 * rows, 96))
    parts = []
    for name, vector, alt in (
        ("Prompt", one, f"{len(one)} values from {one.min():.2f} to {one.max():.2f}"),
        ("Caption", other, f"{len(other)} values from {other.min():.2f} to {other.max():.2f}"),
        (
            "Difference",
            difference,
            f"caption minus prompt: at most {abs(difference[widest]):.2f}, in dimension {widest + 1}",
        ),
    ):
        source = f"data:image/png;base64,{base64.b64encode(heat(vector, most)).decode()}"
        parts.append(
            f"<dt>{name}</dt><dd><img class='strip' style='height:{height}px' src='{source}' alt='{name}: {alt}'></dd>"
        )
    return (
        f"<dl class='strips'>{''.join(parts)}</dl>"
        f"<p class='legend'><span>&minus;{most:.2f}</span><i aria-hidden='true'></i><span>+{most:.2f}</span>"
        f"<span class='note'>{len(one)} dimensions, the same place in each strip. The difference is at most "
        f"{abs(difference[widest]):.3f}; a blank strip means equal vectors.</span></p>"
    )


def heat(vector: numpy.ndarray, most: float) -> bytes:
    """A PNG, one pixel a value in rows of `COLUMNS`: blue below zero, orange above, clear at zero.

    vector: float32 (n,); ``most``: the absolute value that has full colour.
    """
    import numpy as np
    from PIL import Image

    columns = min(COLUMNS, len(vector))
    rows = -(-len(vector) // columns)
    pixels = np.zeros((rows * columns, 4), np.uint8)
    pixels[: len(vector), :3] = np.where((vector < 0)[:, None], NEGATIVE, POSITIVE)
    pixels[: len(vector), 3] = (255 * np.clip(np.abs(vector) / most, 0, 1) ** 0.7).round()
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(rows, columns, 4)).save(file, "PNG")
    return file.getvalue()


def gallery(results: Sequence[Mapping[str, Any]], host: str, now: float) -> str:
    """Past results as they come, each a link to its picture."""
    if not results:
        return "<p class='epd-empty'>Nothing is kept yet. What is validated or generated from now on is shown here.</p>"
    return f"<ul class='gallery'>{''.join(_result(one, host, now) for one in results)}</ul>"


def _result(one: Mapping[str, Any], host: str, now: float) -> str:
    source = address(one, host)
    prompt = escape(str(one.get("prompt") or "without a prompt"), quote=True)
    facts = [f"seed {one['seed']}"] if one.get("seed") is not None else []
    facts += [str(one[key]) for key in ("size", "model") if one.get(key)]
    if one.get("created"):
        facts.append(_ago(now - float(one["created"])))
    rating = ""
    if one.get("verdict"):
        kind, sign = ("match", "✓") if one["verdict"] == "match" else ("mismatch", "✗")
        number = f" {float(one['similarity']):.3f}" if one.get("similarity") is not None else ""
        rating = f"<p class='badge {kind}'><span aria-hidden='true'>{sign}</span> {kind.capitalize()}{number}</p>"
    caption = f"<p class='said'>{escape(str(one['caption']))}</p>" if one.get("caption") else ""
    return (
        f"<li><a href='{source}' target='_blank' rel='noopener'>"
        f"<img src='{source}' alt='Picture made from the prompt: {prompt}' loading='lazy'></a>"
        f"<p class='asked'>{prompt}</p>{caption}{rating}<p class='facts'>{escape(' · '.join(facts))}</p></li>"
    )


def address(one: Mapping[str, Any], host: str) -> str:
    """Where the browser finds a picture, as an attribute. The page asks no other host: a picture whose URL is elsewhere
    (in an object store, say) is taken by its id through the graph.
    """
    parts = urlsplit(str(one.get("url") or ""))
    if not parts.path or parts.netloc not in ("", host):
        path = f"/v1/images/{quote(str(one.get('id')), safe='')}"
        # Where there are keys the graph's own addresses are signed, by whatever name the page reached it.
        parts = SplitResult("", "", path, parts.query if parts.path.endswith(path) else "", "")
    # Relative to /ui/, so that it is right below a proxy's path too.
    return escape(f"../{parts.path.lstrip('/')}" + (f"?{parts.query}" if parts.query else ""), quote=True)


def _card(title: str, content: str, kind: str = "") -> str:
    return f"<section class='epd-card {kind}' aria-label='{title}'><h3>{title}</h3>{content}</section>"


def _seconds(event: Mapping[str, Any]) -> tuple[float, float]:
    stage = event["stage"]
    return float(stage["queue_seconds"]), float(stage["run_seconds"])


def _percent(value: float) -> str:
    return f"{max(0.0, min(1.0, value)) * 100:.1f}"


def _ms(seconds: float) -> str:
    number = seconds * 1000
    return f"{number:,.0f}&nbsp;ms" if number >= 10 or number == 0 else f"{number:.1f}&nbsp;ms"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _ago(seconds: float) -> str:
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
