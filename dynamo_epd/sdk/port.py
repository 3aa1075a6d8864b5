# SPDX-License-Identifier: Apache-2.0
"""The port of a service with HTTP: held by the supervisor for the graph, listened at by every worker of the service."""

from __future__ import annotations

import socket

from dynamo_epd.sdk.config import ConfigError

HOST = "DYNAMO_HTTP_HOST"
PORT = "DYNAMO_HTTP_PORT"
SHARED_PORT = "DYNAMO_HTTP_SHARED_PORT"
"""Set where the supervisor holds the port, so that several workers can listen at it."""


def hold(host: str, port: int) -> socket.socket:
    """Bound and never listening: until it is closed, `bound` finds the port shared, and another `hold` finds it taken.

    Linux looks at both options when a socket is bound, and again when the next one is. While this one is bound it has
    SO_REUSEADDR alone: connections that a former graph left in TIME_WAIT do not count, a socket that listens does.
    Afterwards it has SO_REUSEPORT alone, which only lets in who asks for the same (socket(7), and
    `inet_csk_bind_conflict` in Linux' net/ipv4/inet_connection_sock.c). Raises ConfigError.
    """
    holder = bound(host, port, shared=False)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def bound(host: str, port: int, *, shared: bool) -> socket.socket:
    """A socket to listen with; ``shared``: beside others of this user that are shared too. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, for asyncio sends small writes at once (TCP_NODELAY) only where a socket says that it is TCP's: a stream's
    # next delta would else wait until the client has acknowledged the last, which it puts off for 40 ms.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot open http://{host}:{port}: {error.strerror}") from error
    return found
