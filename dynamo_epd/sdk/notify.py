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
MUST_ARRIVE = frozenset({"READY", "STOPPING", "X_DRAINED"})
WAIT_SECONDS = 1.0
"""For the supervisor to make room for one of those."""

_unsaid: dict[str, str | int] = {}


def notify(**fields: str | int) -> None:
    """Sends ``KEY=value`` lines. Nothing happens where nobody listens.

    Linux keeps some ten messages for a supervisor that stands still (Ctrl-Z), and the event loop that calls this must
    turn all the same: only `MUST_ARRIVE` waits, `WAIT_SECONDS`, and what was not taken goes with the next message.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    message = _unsaid | fields
    text = "\n".join([f"MAINPID={os.getpid()}", *(f"{key}={value}" for key, value in message.items())])
    # An OSError means that the supervisor is gone; PR_SET_PDEATHSIG tells us in its own way.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.settimeout(WAIT_SECONDS if MUST_ARRIVE & fields.keys() else 0)
        # not sendto: whether there is room again can only be waited for where the two are connected
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        try:
            sender.send(text.encode())
        except (BlockingIOError, TimeoutError):
            _unsaid.update(message)
        else:
            _unsaid.clear()
