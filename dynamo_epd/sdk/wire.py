# SPDX-License-Identifier: Apache-2.0
"""How a message crosses the request plane: MessagePack, once each way, as one `bytes` value.

The runtime takes any JSON-like value and has its own codec. Round trips of a request (2 cores, NATS on loopback, p50):

=====================  ========  ========
value given            0.9 MB    350 B
=====================  ========  ========
``dict``               13.6 ms   1.10 ms
JSON in a ``str``       3.7 ms   1.14 ms
MessagePack ``bytes``   2.7 ms   1.09 ms
=====================  ========  ========

A dict is walked object by object under the GIL; bytes pass untouched. In a reply stream the type of a frame says what
it is: ``bytes`` is an item, a ``dict`` is an error (`EpdError.to_wire`) and the last frame, ``True`` is the end marker.
An item behind `LAST` is the end as well. A stream without one of these was cut off: the runtime itself reports a clean
end when a handler is torn down.
``False`` is a beat: nothing yet, and the worker lives. One comes every `BEAT_SECONDS` in which nothing else does, so a
worker that stands still (stopped, its host gone, its event loop stuck) is told from one that has long to work.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import json
import typing
from typing import Any

import msgspec

END = True
LAST = b"\xc1"
"""Before the last item, where the end is known when that is sent: most replies are one item, and a frame of its own for
the end would be half of their cost. No MessagePack value begins with this byte."""
BEAT = False
BEAT_SECONDS = 1.0
SILENT_SECONDS = 2.5
"""After this long without a frame the other end counts as lost."""


def _encode_foreign(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be sent to another service")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_foreign)
_JSON_TYPES = (msgspec.Struct, dict, list)


def encode(value: Any) -> bytes:
    """The MessagePack form of a Struct, dataclass, pydantic model or anything JSON-like."""
    return _encoder.encode(value)


def is_pydantic(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "model_validate")


class Decoder:
    """Turns what arrived into ``kind``.

    ``kind`` may be a Struct, a dataclass, a pydantic model, a builtin or ``Any``. Takes `encode`'s bytes, and for
    callers outside this SDK the plain JSON-like value or a JSON text. Raises ValueError when it does not fit.
    """

    def __init__(self, kind: Any):
        self.kind = kind
        self._pydantic = is_pydantic(kind)
        self._decoder: Any = msgspec.msgpack.Decoder(Any if self._pydantic else kind)
        self._takes_text = kind is Any or kind is str

    def __call__(self, raw: Any) -> Any:
        if isinstance(raw, bytes) and not self._pydantic:
            try:
                return self._decoder.decode(raw)
            except msgspec.ValidationError:
                if self._takes_text:
                    raise
                # Old graphs send `model.model_dump_json()`: JSON text where an object is meant.
                raw = _plain(raw)
                if not isinstance(raw, str):
                    raise
        elif isinstance(raw, bytes):
            raw = _plain(raw)
        if isinstance(raw, str) and not self._takes_text:
            raw = json.loads(raw)
        if self._pydantic:
            return self.kind.model_validate(raw)
        return msgspec.convert(raw, self.kind)


def _plain(raw: bytes) -> Any:
    return msgspec.msgpack.decode(raw)


def to_plain(value: Any) -> Any:
    """The builtins of a reply, for callers outside this SDK."""
    return msgspec.to_builtins(value, enc_hook=_encode_foreign)


def _supported(kind: Any) -> Any:
    """``kind`` if messages can be decoded into it, else Any."""
    if kind is inspect.Parameter.empty or kind is None:
        return Any
    if is_pydantic(kind):
        return kind
    if isinstance(kind, type) and not (
        issubclass(kind, msgspec.Struct)
        or dataclasses.is_dataclass(kind)
        or typing.is_typeddict(kind)
        or kind in (str, bytes, int, float, bool, dict, list, tuple, set)
    ):
        return Any
    try:
        msgspec.msgpack.Decoder(kind)
    except (TypeError, ValueError):
        return Any
    return kind


def request_type(function: Any) -> Any:
    """Annotation of an endpoint's first typed parameter, Any when it has none."""
    hints = _hints(function)
    for name in inspect.signature(function).parameters:
        if name not in ("self", "context") and name in hints:
            return _supported(hints[name])
    return Any


def reply_type(function: Any) -> Any:
    """T of a return annotation ``AsyncIterator[T]`` or ``AsyncGenerator[T, None]``, else Any."""
    returned = _hints(function).get("return")
    if typing.get_origin(returned) in (collections.abc.AsyncIterator, collections.abc.AsyncGenerator):
        return _supported(typing.get_args(returned)[0])
    return Any


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:
        # Names that only a type checker imports: such endpoints exchange plain values.
        return {}
