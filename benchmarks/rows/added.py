# SPDX-License-Identifier: Apache-2.0
"""Row 2: what the graph adds to an engine's call, with an engine that answers at once: frontend, processor, NATS."""

from __future__ import annotations

from time import perf_counter, process_time

from benchmarks import bare, checkpoints
from benchmarks.arms import WORK, graph
from benchmarks.figures import Goal, Row, Samples, percentile
from benchmarks.load import Told, ask, chat, session
from benchmarks.obedient import FAILURES, reason

NUMBER = 2
TITLE = "what the graph adds to an engine's call"
WARM_UP = 50
PER_REPEAT = 200
"""Requests of which one repeat's percentiles are taken."""
CONFIG = """
Common: {dtype: float32, max-model-len: 2048}
Frontend: {ui: false}
Processor: {common-configs: [model, dtype, max-model-len, served-model-name]}
EchoWorker: {common-configs: [model, dtype, max-model-len], slots: 64, token-seconds: 0.0}
"""


async def measure(repeats: int) -> Row:
    """One client; the engine says one token as soon as it is asked."""
    load = f"{repeats} repeats of {PER_REPEAT} text questions, one client, one token at once"
    row = Row(NUMBER, TITLE, f"an echo for an engine, {load}")
    config = (WORK / "echo.yaml").absolute()
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(CONFIG)
    model = checkpoints.directory(checkpoints.TINY)
    with graph("ECHO", "benchmarks.echoing:Frontend", str(config), model, pictures=False) as arm:
        row.notes += [f"`{command}`" for command in arm.commands]
        async with session() as client:

            async def one(number: int) -> Told:
                return await ask(client, arm.url, chat(f"question {number}", tokens=1))

            for number in range(WARM_UP):
                await one(number)
            began, busy = perf_counter(), process_time()
            told = [await one(number) for number in range(WARM_UP, WARM_UP + repeats * PER_REPEAT)]
            row.client.append((process_time() - busy) / (perf_counter() - began))
    failed = [answer.failed for answer in told if answer.failed]
    if failed:
        row.void = f"{len(failed)} requests failed: {failed[0]}"
        return row
    whole = [1e3 * answer.whole for answer in told]
    for share, name, limit in ((0.5, "p50", 2.0), (0.99, "p99", 5.0)):
        values = percentiles(whole, share)
        row.samples.append(Samples(name, values, "ms"))
        row.goals.append(Goal(name, values, "≤", limit, "ms"))
    try:
        alone = [1e3 * one for one in bare.calls(repeats * PER_REPEAT)]
    except FAILURES as error:
        row.notes.append(f"the runtime's own calls failed: {reason(error)}")
        return row
    row.samples.append(Samples("one call of Dynamo's runtime alone, p50", percentiles(alone, 0.5), "ms"))
    row.notes.append(
        "A question is two calls of Dynamo's runtime, one within the other: from the frontend to the processor, and "
        "from there to the engine's worker. What one takes between two processes that do nothing else is shown."
    )
    return row


def percentiles(values: list[float], share: float) -> list[float]:
    """One of each repeat's."""
    return [percentile(values[at : at + PER_REPEAT], share) for at in range(0, len(values), PER_REPEAT)]
