# SPDX-License-Identifier: Apache-2.0
"""The owner of an arena whose reader dies within its READ over TCP.

UCX 1.22 has a fault here, which no setting avoids: over TCP a READ is answered by active messages, and when ``send``
fails because the reader has just died, ``ucp_progress_get_reply`` (src/ucp/rma/rma_sw.c) hands the error to
``ucp_request_try_send``, which knows no error and aborts the process (src/ucp/core/ucp_request.inl). Seen in some 20 of
100 runs. So the owner is a process of its own here, and a run that ended by that very abort is made again. In a graph
the owner is a worker: it is started again, and its requests are conducted anew. Shared memory and RDMA READs are the
reader's own work and have no such reply.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

SCENARIO = Path(__file__).with_name("reader_killed.py")
RUNS = 6
UCX_ABORT = "Fatal: unexpected error: Endpoint timeout"


def test_an_owner_ends_the_lease_of_a_reader_that_died_unless_ucx_aborts_it() -> None:
    aborted = 0
    for _ in range(RUNS):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=no", str(SCENARIO)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        output = run.stdout + run.stderr
        if run.returncode == -signal.SIGABRT and UCX_ABORT in output:
            aborted += 1
            continue
        assert run.returncode == 0, output
        assert "1 passed" in output
    print(f"{RUNS - aborted} owners went on, {aborted} aborted by UCX")
    assert aborted < RUNS
