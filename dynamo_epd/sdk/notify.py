# SPDX-License-Identifier: Apache-2.0
"""What a worker and its supervisor say to each other.

The worker says how it fares by the sd_notify protocol of systemd (datagrams to ``$NOTIFY_SOCKET``), the supervisor what
is to be by signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket

LEAVE = signal.SIGUSR2
"""To a worker that is ready: end once all that it has accepted is finished. SIGTERM, also after it: within the drain
bound."""


def notify(**fields: str | int) -> None:
    """Sends ``KEY=value`` lines. Nothing happens where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    text = "\n".join([f"MAINPID={os.getpid()}", *(f"{key}={value}" for key, value in fields.items())])
    # An OSError means that the supervisor is gone; PR_SET_PDEATHSIG tells us in its own way.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)
