# SPDX-License-Identifier: Apache-2.0
"""The NATS server that this process is told to use: its address, credentials and TLS, and what it says of itself.

The environment says it all, under the names that the Dynamo runtime reads: NATS_SERVER (``nats://`` or ``tls://``);
NATS_AUTH_USERNAME with NATS_AUTH_PASSWORD, or NATS_AUTH_TOKEN, NATS_AUTH_NKEY, NATS_AUTH_CREDENTIALS_FILE;
NATS_TLS_CA_CERT_PATH, NATS_TLS_CLIENT_CERT_PATH with NATS_TLS_CLIENT_KEY_PATH, NATS_TLS_INSECURE.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import ssl
from collections.abc import Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

from dynamo_epd.sdk.config import ConfigError

SERVER = "NATS_SERVER"
USERNAME = "NATS_AUTH_USERNAME"
PASSWORD = "NATS_AUTH_PASSWORD"
TOKEN = "NATS_AUTH_TOKEN"
NKEY = "NATS_AUTH_NKEY"
CREDENTIALS_FILE = "NATS_AUTH_CREDENTIALS_FILE"
CA_FILE = "NATS_TLS_CA_CERT_PATH"
CLIENT_CERT = "NATS_TLS_CLIENT_CERT_PATH"
CLIENT_KEY = "NATS_TLS_CLIENT_KEY_PATH"
INSECURE = "NATS_TLS_INSECURE"
VARIABLES = (
    SERVER,
    USERNAME,
    PASSWORD,
    TOKEN,
    NKEY,
    CREDENTIALS_FILE,
    CA_FILE,
    CLIENT_CERT,
    CLIENT_KEY,
    INSECURE,
)

SECRET = frozenset({PASSWORD, TOKEN, NKEY})


def nats_url() -> str:
    """Of the server that this process is told to use."""
    return os.environ.get(SERVER, "nats://127.0.0.1:4222")


def split_credentials(environment: MutableMapping[str, str]) -> None:
    """Takes ``user:password@`` or ``token@`` out of NATS_SERVER into variables of their own.

    The runtime does not look for them in the address, and an address is shown and hashed where a password must not be.
    """
    parts = urlsplit(_with_scheme(environment.get(SERVER, "")))
    if parts.username is None:
        return
    if parts.password is None:
        environment[TOKEN] = unquote(parts.username)
    else:
        environment[USERNAME], environment[PASSWORD] = unquote(parts.username), unquote(parts.password)
    environment[SERVER] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def connect_options(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Arguments of `nats.connect` for the credentials and TLS of the environment, in the runtime's order.

    Raises ConfigError for certificates that cannot be read, and where a package is missing that signs.
    """
    options: dict[str, Any] = {}
    if USERNAME in environment and PASSWORD in environment:
        options |= {"user": environment[USERNAME], "password": environment[PASSWORD]}
    elif TOKEN in environment:
        options |= {"token": environment[TOKEN]}
    elif NKEY in environment:
        _needs_nkeys(NKEY)
        options |= {"nkeys_seed_str": environment[NKEY]}
    elif CREDENTIALS_FILE in environment:
        _needs_nkeys(CREDENTIALS_FILE)
        options |= {"user_credentials": environment[CREDENTIALS_FILE]}
    if environment.get(SERVER, "").startswith("tls://"):
        options["tls"] = _tls(environment)
    return options


def _needs_nkeys(variable: str) -> None:
    if importlib.util.find_spec("nkeys") is None:
        raise ConfigError(f"{variable}: image jobs sign with the package nkeys, which is not installed")


def _tls(environment: Mapping[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=environment.get(CA_FILE))
        if CLIENT_CERT in environment:
            context.load_cert_chain(environment[CLIENT_CERT], environment.get(CLIENT_KEY))
    except OSError as error:
        files = ", ".join(environment[name] for name in (CA_FILE, CLIENT_CERT, CLIENT_KEY) if name in environment)
        raise ConfigError(f"NATS over TLS: {files}: {error.strerror or error}") from error
    if environment.get(INSECURE, "").lower() in ("1", "true", "yes", "on"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _with_scheme(url: str) -> str:
    return url if "//" in url else f"nats://{url}"


async def server_info(url: str, timeout: float = 5.0) -> dict[str, Any]:
    """The INFO line of the server at ``nats://host:port`` (NATS client protocol), ``max_payload`` among it. It comes
    before TLS and without credentials.

    Raises OSError when nothing answers within ``timeout`` seconds, ValueError when what answers is not NATS.
    """
    parts = urlsplit(_with_scheme(url))
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
            try:
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError as error:
        raise OSError(f"no answer from {url} within {timeout:g} s") from error
    if not line.startswith(b"INFO "):
        raise ValueError(f"{url} is not a NATS server")
    found: dict[str, Any] = json.loads(line[5:])
    return found
