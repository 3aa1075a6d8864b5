# SPDX-License-Identifier: Apache-2.0
"""From what one stage reports to the number of workers it should have: one pure function, no clock and no I/O.

**How many are enough.** The offered load is Little's law, ``a = rate × run seconds`` (J. D. C. Little, 1961). A worker
runs ``concurrency`` requests at once, so ``n`` workers are ``n × concurrency`` servers. Enough is the smallest ``n``
that keeps utilisation at or below ``1 - headroom`` and the mean wait of Erlang's delay formula (A. K. Erlang, 1917)
at or below ``queue_target``. If requests wait beyond what the target allows, what clears them within ``catch_up``
seconds comes on top. Jobs that no worker has taken are among them; of these a worker takes one at a time.

**How it notices a burst.** The rate is that of the last ``window`` seconds. A shorter time counts instead when it holds
more arrivals than chance allows: a Shewhart control chart on counts made normal, ``2 sqrt(k + 3/8)`` (F. J. Anscombe,
1948; the plain ``mean + 3 sqrt(mean)`` is crossed by chance every few minutes where few arrive). It then counts with
one standard error taken off, so that a guess from few arrivals errs low and later ones mend it.

**Why it does not flap.** A stage grows at once and shrinks late, as the Kubernetes HorizontalPodAutoscaler does: to the
highest number wanted in the last ``cool_down`` seconds (its stabilisation window), and only if that number would still
do with the load ``1 + tolerance`` times as high (its tolerance). It never shrinks while requests wait too long.

**What it leaves alone.** A stage none of whose requests has finished: how long one takes is not known. A stage that was
set to no worker: nobody is left there who could say that one is needed. For the same reason it never takes the last.

**When the model is wrong.** Requests that wait longer than the target although there is a server for each of them mean
that ``concurrency`` promises too much. So do those for whom there is none, where workers that were to clear them within
``catch_up`` have not. One worker more then, and no other before the first was seen to help.

**What it learns from that.** The model has not become right once enough have come: its own answer would send all others
away after one ``cool_down``, requests would be late again, and so on for ever. So it is remembered how many it took at
which load, and a stage keeps as many, or fewer in proportion where its load is lower. That only ever holds workers back
from leaving; none is asked for because of it. And it fades, a worker every `PROVED_SECONDS`: the cause may have been
another one, such as chance. Where it was not, requests are late for a moment and the worker is back.
"""

from __future__ import annotations

import bisect
import dataclasses
import math

BURST_WINDOWS = (2.0, 10.0)
"""Seconds in which a burst is looked for."""
SIGMAS = 4.0
"""By chance such a count comes once in nine hours of looks a second apart. A chart's usual 3: every twelve minutes."""
QUEUE_WINDOW = 10.0
"""Seconds over which the measured queue time is a mean."""
SETTLE = 20.0
"""Seconds after a change in which measured queue times still tell of what was before."""
PROVED_SECONDS = 3600.0
"""Until one worker fewer is tried than measured queue times have asked for."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one stage is held to. Times in seconds. Raises ValueError for what cannot be."""

    min: int = 1
    """Fewest workers. 0 allows none at all by hand; a planner keeps one."""
    max: int = 8
    """Most workers. Where a configuration does not say it, `dynamo scale` takes 64 for this."""
    queue_target: float = 0.5
    """Seconds: mean wait of a request in this stage."""
    concurrency: int = 1
    """Requests that one worker runs at once in the time that one of them takes: its batch, or 1."""
    headroom: float = 0.3
    """Share of the servers that is left free for what comes while another worker starts."""
    cool_down: float = 300.0
    """Seconds for which fewer workers must have been enough before one is ended."""
    window: float = 60.0
    """Seconds over which arrivals and run times are means."""
    tolerance: float = 0.1
    """Share by which a wait may be above its target, and the load that fewer workers must do is taken higher."""
    catch_up: float = 30.0
    """Seconds in which what waits beyond the target is to be cleared."""

    def __post_init__(self) -> None:
        for name in ("min", "max", "concurrency"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number")
        if not 0 <= self.min <= self.max or self.max < 1:
            raise ValueError(f"0 <= min <= max and 1 <= max must hold; min is {self.min}, max is {self.max}")
        if self.concurrency < 1 or self.queue_target <= 0 or self.window <= 0 or self.catch_up <= 0:
            raise ValueError("concurrency, queue-target, window and catch-up must be above 0")
        if not 0 <= self.headroom < 1 or self.cool_down < 0 or self.tolerance < 0:
            raise ValueError("headroom must be from 0 to below 1, cool-down and tolerance not negative")


@dataclasses.dataclass(frozen=True)
class Observed:
    """One stage, all of its workers together. Counts and seconds are sums since the beginning and never fall."""

    replicas: int
    """Workers that there are or that start; one that drains does not count."""
    ready: int
    in_stage: float
    """Requests that wait or run now."""
    finished: float
    run_seconds: float
    queued: float
    """Requests whose wait is over."""
    queue_seconds: float
    known_late: float = 0.0
    """Requests that were first seen, or seen again, some time after they had come: no arrivals."""
    jobs: float = 0.0
    """Jobs that no worker has taken: they arrive when one does."""

    @property
    def arrived(self) -> float:
        return self.finished + self.in_stage - self.known_late


@dataclasses.dataclass(frozen=True)
class State:
    """What is remembered of a stage from one look to the next."""

    looks: tuple[tuple[float, Observed], ...] = ()
    """Of the last ``window`` seconds, and the last one before."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, workers) wanted within the cool-down, without those that a later and higher one covers."""
    run_seconds: float | None = None
    """Mean of one request, from the last window in which any finished."""
    needed: float | None = None
    """When as many workers as there are were last wanted."""
    enough: float | None = None
    """The last look at which there were as many workers as are wanted, or another number of them than now."""
    changed: float = -math.inf
    """When the number of workers was last seen to change, or the last of them to become ready."""
    proved: tuple[float, float, int] | None = None
    """(time, load, workers) of the last worker that measured queue times asked for: one fewer was too few."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """``cause``: the earliest time since which the condition that led to it can have held. Of a growth that is the last
    look at which there were workers enough, or another number of them. What the policy waits for belongs to the
    condition: the cool-down of workers that leave, the settling of a stage in which requests wait for one more.
    """

    replicas: int
    reason: str
    cause: float


def decide(state: State, observed: Observed, now: float, limits: Limits) -> tuple[State, Decision | None]:
    """One look at a stage: what to remember, and the number of workers it should have if that is another one."""
    last = state.looks[-1] if state.looks else (now, observed)
    enough = state.enough if state.enough is not None and last[1].replicas == observed.replicas else last[0]
    state = _remember(state, observed, now, limits.window)
    if observed.replicas == 0:
        return state, None
    least = max(1, limits.min)
    seconds = state.run_seconds or 0.0
    load = _rate(state, limits.window) * seconds
    slots = observed.ready * limits.concurrency
    waiting = max(0.0, observed.in_stage - slots) + observed.jobs
    backlog = waiting + observed.jobs * (limits.concurrency - 1)  # a job is all that its worker takes at once
    queue = mean_queue(state, now)
    late = queue is not None and queue > limits.queue_target * (1 + limits.tolerance)

    wanted = replicas_for(load, seconds, limits)
    reason = f"{load:.2f} requests run at once"
    if waiting and slots and backlog * seconds / slots > limits.queue_target:
        extra = backlog * seconds / limits.catch_up
        wanted = max(wanted, math.ceil((load / (1 - limits.headroom) + extra) / limits.concurrency))
        reason += f", {waiting:g} wait"
    patience = SETTLE + (limits.catch_up if waiting else 0.0)
    settled = observed.replicas == observed.ready and now - state.changed >= patience
    if late and settled and wanted <= observed.replicas:
        wanted = observed.replicas + 1
        # after a burst little comes any more, but the waits that end are those of a stage that was full
        state = dataclasses.replace(state, proved=(now, max(load, _ran_at_once(state, now)), wanted))
        reason = f"requests wait {queue:.2f} s, target {limits.queue_target:g} s"
    wanted = min(max(wanted, least), limits.max)

    with_tolerance = replicas_for(load * (1 + limits.tolerance), seconds, limits)
    keep = min(max(wanted, with_tolerance, least, _proved(state, load, now)), limits.max)
    if late or waiting:
        keep = max(keep, min(observed.replicas, limits.max))
    state = _want(state, keep, observed, now, limits)

    if wanted > observed.replicas:
        return dataclasses.replace(state, enough=enough), Decision(wanted, reason, enough)
    state = dataclasses.replace(state, enough=now)
    assert state.needed is not None
    highest = max(count for _, count in state.wanted)
    if highest < observed.replicas and now - state.needed >= limits.cool_down:
        return state, Decision(highest, f"{reason} for {limits.cool_down:g} s", state.needed + limits.cool_down)
    return state, None


def replicas_for(load: float, run_seconds: float, limits: Limits) -> int:
    """The smallest number of workers that keeps headroom and queue target under ``load``, requests at once."""
    count = max(1, math.ceil(load / (1 - limits.headroom) / limits.concurrency - 1e-9))
    while count < limits.max and mean_wait(load, count * limits.concurrency, run_seconds) > limits.queue_target:
        count += 1
    return count


def mean_wait(load: float, servers: int, run_seconds: float) -> float:
    """Seconds that a request waits on average: Erlang's delay formula for M/M/c.

    By the recursion of Erlang's loss formula, ``B(s) = a B(s-1) / (s + a B(s-1))``, and ``C = B / (1 - a/s (1 - B))``.
    """
    if load >= servers:
        return math.inf
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = load * blocked / (server + load * blocked)
    delayed = blocked / (1 - load / servers * (1 - blocked))
    return delayed * run_seconds / (servers - load)


def _remember(state: State, observed: Observed, now: float, window: float) -> State:
    looks = (*state.looks, (now, observed))
    while len(looks) > 2 and looks[1][0] <= now - window:
        looks = looks[1:]
    first = looks[0][1]
    finished = observed.finished - first.finished
    seconds = (observed.run_seconds - first.run_seconds) / finished if finished > 0 else state.run_seconds
    last = state.looks[-1][1] if state.looks else None
    steady = last is not None and (last.replicas, last.ready) == (observed.replicas, observed.ready)
    return dataclasses.replace(
        state, looks=looks, run_seconds=seconds, changed=state.changed if steady else now, needed=state.needed
    )


def _back(state: State, now: float, seconds: float) -> tuple[float, Observed]:
    """The last look that is at least ``seconds`` old, or the first there is."""
    place = bisect.bisect_right(state.looks, now - seconds + 1e-6, key=lambda look: look[0])
    return state.looks[max(0, place - 1)]


def _rate(state: State, long_window: float) -> float:
    """Arrivals per second: of the whole window, or of a shorter time in which too many came to be chance."""
    now, last = state.looks[-1]
    then, first = _back(state, now, long_window)
    long_rate = max(0.0, last.arrived - first.arrived) / (now - then) if now > then else 0.0
    rate = long_rate
    for window in BURST_WINDOWS:
        then, first = _back(state, now, window)
        arrived, mean = last.arrived - first.arrived, long_rate * (now - then)
        if now > then and arrived > mean and 2 * (math.sqrt(arrived + 0.375) - math.sqrt(mean + 0.375)) > SIGMAS:
            rate = max(rate, (arrived - math.sqrt(arrived)) / (now - then))
    return rate


def mean_queue(state: State, now: float) -> float | None:
    """Mean seconds of the waits that ended within `QUEUE_WINDOW`, or None where none did."""
    _, last = state.looks[-1]
    _, first = _back(state, now, QUEUE_WINDOW)
    ended = last.queued - first.queued
    return (last.queue_seconds - first.queue_seconds) / ended if ended > 0 else None


def _ran_at_once(state: State, now: float) -> float:
    """Requests that ran at once on average while those waited that `mean_queue` tells of: a `QUEUE_WINDOW` earlier."""
    then, first = _back(state, now, 2 * QUEUE_WINDOW)
    end, last = _back(state, now, QUEUE_WINDOW)
    return (last.run_seconds - first.run_seconds) / (end - then) if end > then else 0.0


def _proved(state: State, load: float, now: float) -> int:
    """Workers that ``load`` needs by what was measured, or 0 where nothing was."""
    if state.proved is None:
        return 0
    then, proved_load, count = state.proved
    fading = count - int((now - then) / PROVED_SECONDS)
    return math.ceil(fading * min(1.0, load / proved_load)) if proved_load > 0 else 0


def _want(state: State, count: int, observed: Observed, now: float, limits: Limits) -> State:
    """Keeps a falling series of (time, count): its first entry is the highest of the window."""
    series = (*(one for one in state.wanted if one[1] > count), (now, count))
    first = now if state.needed is None else state.needed
    needed = max((time for time, wanted in series if wanted >= observed.replicas), default=first)
    kept = tuple(one for one in series if one[0] > now - limits.cool_down or one[0] == now)
    return dataclasses.replace(state, wanted=kept, needed=needed)
