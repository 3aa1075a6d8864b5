# SPDX-License-Identifier: Apache-2.0
"""``data:`` URLs (RFC 2397), the way most clients send a picture."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import pybase64

from dynamo_epd.errors import MediaError, PayloadTooLarge

_MAX_HEADER = 1024
"""Characters before the comma: a media type with its parameters."""
_MAX_QUOTED = 1024 * 1024
"""Characters of a percent-encoded payload: each escape costs an object, so megabytes of them are not unpacked."""


def parse_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes that a data URL carries; its media type is not believed (decode.py looks at the bytes).

    Base64 is read strictly: standard alphabet, padded, no white space, as a plain ``vllm serve`` reads it, except that
    ``+ / =`` may be percent-encoded. Without ``;base64`` the data are percent-encoded octets. Raises `MediaError`, and
    `PayloadTooLarge` for more than ``max_bytes``, judged before decoding.
    """
    if url[:5].lower() != "data:":
        raise MediaError("not a data URL")
    comma = url.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise MediaError("the data URL has no comma after its media type")
    parameters = url[5:comma].lower().replace(" ", "").split(";")
    payload = url[comma + 1 :]
    if "base64" in parameters[1:]:
        data = _from_base64(payload, max_bytes)
    else:
        if len(payload) > _MAX_QUOTED:
            raise PayloadTooLarge(f"a data URL of more than {_MAX_QUOTED} characters must be base64")
        if not payload.isascii():
            raise MediaError("the data URL holds characters outside ASCII")
        data = unquote_to_bytes(payload)
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    if not data:
        raise MediaError("the data URL is empty")
    return data


def _from_base64(payload: str, max_bytes: int) -> bytes:
    if "%" in payload:
        for code, character in (("%2B", "+"), ("%2F", "/"), ("%3D", "=")):
            payload = payload.replace(code, character).replace(code.lower(), character)
    if len(payload) > (max_bytes + 2) // 3 * 4:
        raise _too_large(max_bytes)
    try:
        return pybase64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error, and characters outside ASCII
        raise MediaError("the data URL holds bad base64") from error


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the data URL carries more than {max_bytes} bytes")
