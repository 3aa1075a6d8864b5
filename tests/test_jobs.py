# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real NATS server that is killed, with workers that are."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import nats
import pytest
from nats.js.errors import NotFoundError

from dynamo_epd.errors import Gone, InternalError, InvalidRequest, NotFound, Overloaded, StageUnavailable, WorkerLost
from dynamo_epd.http.images import MAX_IMAGES, MAX_PROMPT, check_images
from dynamo_epd.jobs import JobQueue, JobsConfig, KeyReused
from dynamo_epd.sdk.nats_server import nats_binary

STREAM = "tests_image_jobs"
QUICK = JobsConfig(silence_seconds=1.0, retry_seconds=0.2, attempts=3)
BOUND = 60.0


class Server:
    """A nats-server with JetStream, on a port and a directory that outlive it."""

    def __init__(self, home: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self._home = home
        self.start()

    def start(self):
        command = [nats_binary(), "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(self._home)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + BOUND
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError("nats-server does not answer")

    def kill(self):
        self._process.kill()
        self._process.wait()


@pytest.fixture
def server(tmp_path):
    found = Server(tmp_path)
    yield found
    found.kill()


@contextlib.asynccontextmanager
async def queue(server, config=QUICK):
    found = JobQueue("tests", config)
    await found.open(server.url)
    try:
        yield found
    finally:
        await found.close()


def wanted(prompt="a red star"):
    return check_images({"prompt": prompt, "seed": 1}).picture


async def submitted(jobs, prompt="a red star", key=None, tenant="", n=1):
    return await jobs.submit(tenant, wanted(prompt), n, digest=prompt, key=key)


async def over(jobs, id, tenant=""):
    async with asyncio.timeout(BOUND):
        while True:
            with contextlib.suppress(StageUnavailable):
                state = await jobs.state(tenant, id)
                if state.over:
                    return state
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def operator(server):
    """JetStream as somebody sees it who is no part of the graph."""
    connection = await nats.connect(server.url)
    try:
        yield connection.jetstream()
    finally:
        await connection.close()


async def nothing(job, lain):
    pass


async def until_gone(jobs, id):
    """The last that was said of a job before it was gone."""
    state = None
    async with asyncio.timeout(BOUND):
        while True:
            try:
                state = await jobs.state("", id)
            except Gone:
                return state
            await asyncio.sleep(0.05)


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 2 * BOUND))


def test_a_job_is_queued_runs_and_is_completed(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            state = await submitted(front, n=3)
            assert (await front.state("", state.id)).status == "queued"
            seen = []

            async def make(job, lain):
                seen.append((job.id, job.pictures, job.wanted.prompt, (await front.state("", job.id)).status))

            worker.work(make)
            ended = await over(front, state.id)
            assert (ended.status, ended.attempts, ended.error) == ("completed", 1, None)
            assert seen == [(state.id, state.pictures, "a red star", "in_progress")]
            assert len(set(state.pictures)) == 3

    run(scenario())


def test_workers_know_how_many_jobs_nobody_has_taken(server, monkeypatch):
    monkeypatch.setattr("dynamo_epd.jobs.REQUEST_SECONDS", 1.0)
    monkeypatch.setattr("dynamo_epd.jobs.LOOK_SECONDS", 0.05)

    async def scenario():
        async with queue(server) as front, queue(server) as one, queue(server) as another:
            assert one.waiting is None, "it does not work yet"
            go = asyncio.Event()

            async def make(job, lain):
                await go.wait()

            async def told(*counts):
                async with asyncio.timeout(BOUND):
                    while [worker.waiting for worker in (one, another)] != list(counts):
                        await asyncio.sleep(0.02)

            jobs = [await submitted(front, str(number)) for number in range(4)]
            one.work(make)
            await told(3, None)
            another.work(make)
            await told(2, 2)
            jobs.append(await submitted(front, "one more"))
            await told(3, 3)
            server.kill()
            await told(None, None)
            server.start()
            await told(3, 3)
            go.set()
            for job in jobs:
                assert (await over(front, job.id)).status == "completed"
            await told(0, 0)
            go.clear()
            await submitted(front, "the last for one")
            await submitted(front, "the last for another")
            await submitted(front, "the last that waits")
            await told(1, 1)
            async with operator(server) as somebody:
                await somebody.delete_stream(STREAM)
            await told(None, None)

    run(scenario())


def test_a_worker_that_has_nothing_to_do_begins_a_job_at_once(server, monkeypatch):
    """Also while whoever accepted it writes that it is in the queue, and where another asks for jobs as often."""
    monkeypatch.setattr("dynamo_epd.jobs.FETCH_SECONDS", 0.003)
    patient = JobsConfig(silence_seconds=BOUND, retry_seconds=BOUND)

    async def scenario():
        async with queue(server, patient) as front, queue(server, patient) as one, queue(server, patient) as another:
            begun: asyncio.Queue[str] = asyncio.Queue()
            go = asyncio.Event()

            def worker(name):
                async def make(job, lain):
                    begun.put_nowait(name)
                    await go.wait()

                return make

            one.work(worker("one"))
            another.work(worker("another"))
            for _ in range(40):
                go.clear()
                jobs = await asyncio.gather(*(submitted(front, str(number)) for number in range(2)))
                assert {await begun.get(), await begun.get()} == {"one", "another"}
                go.set()
                for job in jobs:
                    assert (await over(front, job.id)).attempts == 1

    run(scenario())


def test_a_job_of_the_longest_prompts_is_taken(server):
    """Of characters that JSON spells with six bytes each."""

    async def scenario():
        async with queue(server) as front:
            long = check_images({"prompt": "a" + "\x01" * (MAX_PROMPT - 1), "negative_prompt": "\x01" * MAX_PROMPT})
            state = await front.submit("", long.picture, MAX_IMAGES, digest="long", key=None)
            seen = []

            async def make(job, lain):
                seen.append(job.wanted)

            front.work(make)
            assert (await over(front, state.id)).status == "completed"
            assert seen == [long.picture]

    run(scenario())


def test_a_job_is_its_tenants(server):
    async def scenario():
        async with queue(server) as front:
            state = await submitted(front, tenant="one", key="k")
            assert (await front.state("one", state.id)).id == state.id
            for tenant, id in (("two", state.id), ("", state.id), ("one", "job-0"), ("one", "job- *>")):
                with pytest.raises(NotFound):
                    await front.state(tenant, id)
            assert (await submitted(front, tenant="two", key="k")).id != state.id

    run(scenario())


def test_an_idempotency_key_gives_one_job(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            first, *others = await asyncio.gather(*(submitted(front, key="the key") for _ in range(8)))
            assert {(one.id, *one.pictures) for one in others} == {(first.id, *first.pictures)}
            with pytest.raises(KeyReused):
                await submitted(front, "another prompt", key="the key")
            seen = []

            async def make(job, lain):
                seen.append(job.id)

            worker.work(make)
            await over(front, first.id)
            assert (await submitted(front, key="the key")).status == "completed"
            last = await submitted(front)
            await over(front, last.id)
            assert seen == [first.id, last.id]

    run(scenario())


def test_a_full_queue_refuses_and_forgets_what_it_refused(server):
    async def scenario():
        async with queue(server, replace(QUICK, max_waiting=2)) as front:
            await submitted(front)
            await submitted(front)
            with pytest.raises(Overloaded):
                await submitted(front, key="third")
            async with queue(server) as wider:  # its bounds are the ones of the last start
                assert (await submitted(wider, key="third")).status == "queued"

    run(scenario())


def test_a_full_queue_takes_no_accepted_job_back(server):
    """The same idempotency key again, when JetStream has forgotten that the job's message is there."""

    async def scenario():
        async with queue(server, replace(QUICK, max_waiting=2)) as front, operator(server) as stream:
            accepted = await submitted(front, key="first")
            await submitted(front)
            config = (await stream.stream_info(STREAM)).config
            await stream.update_stream(config, duplicate_window=0.1)
            await asyncio.sleep(0.3)
            assert (await submitted(front, key="first")).id == accepted.id
            assert (await front.state("", accepted.id)).status == "queued"
            front.work(nothing)
            ended = await over(front, accepted.id)
            assert (ended.status, ended.pictures) == ("completed", accepted.pictures)

    run(scenario())


def test_a_refused_job_that_another_call_had_accepted_stays(server, monkeypatch):
    """Two calls with one key: the queue has room again between the refusal of the first and its taking back."""

    async def scenario():
        async with queue(server, replace(QUICK, max_waiting=1)) as front:
            await submitted(front)
            publish, seconds = front._stream.publish, []

            async def refused(subject, *arguments, **more):
                try:
                    return await publish(subject, *arguments, **more)
                except Exception:
                    if subject == STREAM:
                        async with queue(server) as wider:
                            seconds.append(await submitted(wider, key="both"))
                    raise

            monkeypatch.setattr(front._stream, "publish", refused)
            with pytest.raises(Overloaded):
                await submitted(front, key="both")
            (accepted,) = seconds
            assert (await front.state("", accepted.id)).status == "queued"
            async with queue(server) as worker:
                worker.work(nothing)
                assert (await over(front, accepted.id)).pictures == accepted.pictures

    run(scenario())


def test_a_start_with_other_bounds_holds_for_what_is_there(server):
    """Jobs and states are kept longer, and a job may be silent for longer: nothing is begun twice, nothing lost."""

    async def scenario():
        async with queue(server, replace(QUICK, silence_seconds=0.5, keep_seconds=1.0)) as before:
            before.work(nothing)
            await over(before, (await submitted(before)).id)
        after = replace(QUICK, silence_seconds=30.0, keep_seconds=500.0)
        async with queue(server, after) as front, queue(server, after) as other, operator(server) as stream:
            kept = {name: (await stream.stream_info(name)).config.max_age for name in (STREAM, f"KV_{STREAM}")}
            assert kept == {STREAM: 1000.0, f"KV_{STREAM}": 1500.0}
            state = await submitted(front)
            begun = []

            async def long(job, lain):
                begun.append(job.id)
                await asyncio.sleep(2)

            front.work(long)
            other.work(long)
            assert (await over(front, state.id)).attempts == 1
            assert begun == [state.id]
            assert (await stream.consumer_info(STREAM, STREAM)).config.ack_wait == 30.0

    run(scenario())


def test_a_job_whose_state_is_lost_is_done_all_the_same(server):
    async def scenario():
        async with queue(server) as front, operator(server) as stream:
            state = await submitted(front, key="k", n=2)
            await (await stream.key_value(STREAM)).purge(state.id)
            with pytest.raises(NotFound):
                await front.state("", state.id)
            front.work(nothing)
            async with asyncio.timeout(BOUND):
                while True:
                    with contextlib.suppress(NotFound):
                        if (ended := await front.state("", state.id)).over:
                            break
                    await asyncio.sleep(0.05)
            assert (ended.status, ended.pictures, ended.prompt) == ("completed", state.pictures, state.prompt)
            assert (await submitted(front, key="k", n=2)).status == "completed", "its key is known again"

    run(scenario())


def test_a_job_that_waited_too_long_fails_and_says_so(server):
    async def scenario():
        async with queue(server, replace(QUICK, keep_seconds=1.0)) as front:
            state = await submitted(front)
            await asyncio.sleep(1.3)
            ran = []

            async def make(job, lain):
                ran.append(job)

            front.work(make)
            ended = await over(front, state.id)
            assert (ended.status, ended.attempts, ran) == ("failed", 0, [])
            assert ended.error is not None
            assert "waited" in ended.error["message"]

    run(scenario())


def test_a_job_that_nobody_ever_takes_is_not_queued_for_ever(server):
    async def scenario():
        async with queue(server, replace(QUICK, keep_seconds=0.5)) as front:
            state = await submitted(front)
            ended = await over(front, state.id)
            assert ended.status == "failed"
            assert ended.ended == pytest.approx(state.created + 1.0)

    run(scenario())


def test_an_ended_job_is_gone_after_its_time_and_its_key_is_free_again(server):
    async def scenario():
        async with queue(server, replace(QUICK, keep_seconds=2.0)) as front, operator(server) as stream:
            front.work(nothing)
            state = await submitted(front, key="k")
            last = await until_gone(front, state.id)
            assert last.status == "completed"
            assert time.time() >= last.ended + 2.0
            absent = "job-" + "0" * 32
            for tenant, id in (("other", state.id), ("", absent), ("other", absent)):
                with pytest.raises(NotFound) as unknown:
                    await front.state(tenant, id)
                assert type(unknown.value) is NotFound
                assert unknown.value.message == "there is no such job"
            assert (await stream.stream_info(f"KV_{STREAM}")).config.max_age == 6.0, "nor is that remembered for ever"
            again = await submitted(front, "another prompt", key="k")
            assert again.id == state.id
            assert again.pictures != state.pictures
            ended = await over(front, again.id)
            assert (ended.status, ended.prompt) == ("completed", "another prompt")

    run(scenario())


@pytest.mark.parametrize("what", ["the consumer", "the queue", "the states", "everything"])
def test_what_is_deleted_under_a_worker_is_made_again(server, what):
    async def scenario():
        async with queue(server) as front, queue(server) as worker, operator(server) as stream:
            worker.work(nothing)
            await over(front, (await submitted(front)).id)
            if what == "the consumer":
                await stream.delete_consumer(STREAM, STREAM)
            if what in ("the queue", "everything"):
                await stream.delete_stream(STREAM)
            if what in ("the states", "everything"):
                await stream.delete_stream(f"KV_{STREAM}")
            async with asyncio.timeout(BOUND):
                while True:
                    with contextlib.suppress(StageUnavailable):
                        state = await submitted(front)
                        break
                    await asyncio.sleep(0.1)
            assert (await over(front, state.id)).status == "completed"

    run(scenario())


def test_a_worker_survives_what_nobody_expected(server, monkeypatch):
    async def scenario():
        async with queue(server) as front:
            one, two = front._one, list[object]()

            async def broken_once(message, run):
                if not two:
                    two.append(message)
                    raise ZeroDivisionError
                await one(message, run)

            monkeypatch.setattr(front, "_one", broken_once)
            front.work(nothing)
            assert (await over(front, (await submitted(front)).id)).status == "completed"

    run(scenario())


def test_a_job_lies_in_the_queue_from_its_arrival_there_however_often_it_is_delivered(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            before = time.time()
            state = await submitted(front)
            after, seen = time.time(), []

            async def make(job, lain):
                seen.append((lain, time.time()))
                if len(seen) == 1:
                    raise StageUnavailable("the store is away")

            await asyncio.sleep(0.3)
            worker.work(make)
            await over(front, state.id)
            (first, begun), (second, again) = seen
            assert 0.3 < first <= begun - before
            assert begun - after + QUICK.retry_seconds < second <= again - before

    run(scenario())


def test_a_job_that_never_came_into_the_queue_has_not_lain_there(server, monkeypatch):
    """Its frontend died when it had written the state, an hour before its idempotency key is used again."""

    async def scenario():
        async with queue(server) as front:
            publish, now = front._stream.publish, time.time

            async def dies(subject, *arguments, **more):
                if subject == STREAM:
                    raise ConnectionError
                return await publish(subject, *arguments, **more)

            with monkeypatch.context() as before:
                before.setattr("dynamo_epd.jobs.time.time", lambda: now() - 3600)
                before.setattr(front._stream, "publish", dies)
                with pytest.raises(StageUnavailable):
                    await submitted(front, key="k")
            state = await submitted(front, key="k")
            assert state.created < now() - 3500, "it is the same job"
            seen = []

            async def make(job, lain):
                seen.append(lain)

            front.work(make)
            assert (await over(front, state.id)).status == "completed"
            (lain,) = seen
            assert lain < BOUND

    run(scenario())


def test_a_job_from_a_clock_that_is_ahead_has_not_waited(server, monkeypatch):
    """NATS' own, which says when it came."""

    async def scenario():
        async with queue(server) as front:
            state = await submitted(front)
            now, seen = time.time, []

            async def make(job, lain):
                seen.append(lain)

            with monkeypatch.context() as behind:
                behind.setattr("dynamo_epd.jobs.time.time", lambda: now() - 3600)
                front.work(make)
                assert (await over(front, state.id)).status == "completed"
            assert seen == [0.0]

    run(scenario())


def test_a_refusal_ends_the_job_and_what_is_away_does_not(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            away = [StageUnavailable("the store is away")] * 5

            async def make(job, lain):
                if job.wanted.prompt == "bad":
                    raise InvalidRequest("no such size", param="size")
                if away:
                    raise away.pop()

            worker.work(make)
            bad, good = await submitted(front, "bad"), await submitted(front, "good")
            ended = await over(front, bad.id)
            assert ended.status == "failed"
            assert ended.error is not None
            assert ended.error["param"] == "size"
            ended = await over(front, good.id)
            assert (ended.status, ended.attempts) == ("completed", 1)

    run(scenario())


def test_what_breaks_in_another_stage_costs_an_attempt_and_not_the_job(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            broken = [InternalError("internal error"), WorkerLost("the EmbedWorker went away")]

            async def make(job, lain):
                if broken:
                    raise broken.pop()

            worker.work(make)
            ended = await over(front, (await submitted(front, "good")).id)
            assert (ended.status, ended.attempts) == ("completed", 3)

    run(scenario())


def test_a_job_that_is_asked_for_again_is_in_the_queue_once(server, monkeypatch):
    """Also once the queue itself does not know a repetition any more, and after it was given back."""
    monkeypatch.setattr("dynamo_epd.jobs.DEDUPLICATION_SECONDS", 0.2)

    async def scenario():
        async with queue(server) as front:

            async def waiting():
                await asyncio.sleep(0.5)
                assert (await submitted(front, key="again")).id == state.id
                return (await front._stream.stream_info(STREAM)).state.messages

            state = await submitted(front, key="again")
            assert await waiting() == 1
            begun = asyncio.Event()

            async def long(job, lain):
                begun.set()
                await asyncio.sleep(BOUND)

            async with queue(server) as leaving:
                leaving.work(long)
                await begun.wait()
            state = await front.state("", state.id)
            assert state.status == "queued"
            assert await waiting() == 1

    run(scenario())


def test_what_somebody_else_has_said_of_a_jobs_end_stays(server):
    async def scenario():
        async with queue(server) as front:
            state = await submitted(front)

            async def late(job, lain):
                ended = (await front.state("", job.id)).end(None, time.time())
                await front._states.put(job.id, msgspec.json.encode(ended))
                raise InvalidRequest("no such size")

            async with queue(server) as worker:
                worker.work(late)
                assert (await over(front, state.id)).status == "completed"
                await asyncio.sleep(1)
            assert (await front.state("", state.id)).status == "completed"

    run(scenario())


PATIENT = replace(QUICK, silence_seconds=600.0)
"""Nobody is taken for dead meanwhile: what is delivered again was given back."""


def test_a_worker_that_leaves_gives_its_job_back(server):
    async def scenario():
        async with queue(server, PATIENT) as front:
            state = await submitted(front)
            begun = asyncio.Event()

            async def long(job, lain):
                begun.set()
                await asyncio.sleep(BOUND)

            async with queue(server, PATIENT) as leaving:
                leaving.work(long)
                await begun.wait()
            assert (await front.state("", state.id)).status == "queued"
            async with queue(server, PATIENT) as worker:
                worker.work(nothing)
                assert (await over(front, state.id)).attempts == 1

    run(scenario())


def test_a_job_that_is_given_to_a_worker_that_turns_to_leave_is_anothers(server):
    """Its question for one is open still."""

    async def scenario():
        async with queue(server, PATIENT) as front, queue(server, PATIENT) as other, operator(server) as stream:
            taken, leave = [], asyncio.Event()

            async def make(job, lain):
                taken.append(job.id)

            async with queue(server, PATIENT) as leaving:
                leaving.work(make, leave)
                async with asyncio.timeout(BOUND):
                    while not await is_asked(stream):
                        await asyncio.sleep(0.01)
                leave.set()
                state = await submitted(front)
                await leaving.finished()
            given = (await stream.consumer_info(STREAM, STREAM)).delivered.consumer_seq
            assert given == 1, "nobody else was there"
            other.work(nothing)
            assert (await over(front, state.id)).attempts == 1
            assert taken == []

    run(scenario())


async def is_asked(stream):
    """Somebody waits for a job."""
    with contextlib.suppress(NotFoundError):  # nobody has yet
        return (await stream.consumer_info(STREAM, STREAM)).num_waiting > 0
    return False


def test_a_worker_leaves_in_mid_job_where_nats_is_away(server, monkeypatch):
    monkeypatch.setattr("dynamo_epd.jobs.REQUEST_SECONDS", 1.0)

    async def scenario():
        async with queue(server) as front:
            state = await submitted(front)
            leaving, begun = JobQueue("tests", QUICK), asyncio.Event()
            await leaving.open(server.url)

            async def long(job, lain):
                begun.set()
                await asyncio.sleep(BOUND)

            leaving.work(long)
            await begun.wait()
            server.kill()
            async with asyncio.timeout(BOUND / 2):
                await leaving.close()
            await asyncio.to_thread(server.start)
            async with queue(server) as worker:
                worker.work(nothing)
                ended = await over(front, state.id)
                assert (ended.status, ended.attempts) == ("completed", 2), "nobody was told: the first is an attempt"

    run(scenario())


WORKER = """
import asyncio, os, sys
from pathlib import Path
from dynamo_epd.jobs import JobQueue, JobsConfig

async def main(url, home):
    jobs = JobQueue("tests", JobsConfig(silence_seconds=1.0, retry_seconds=0.2, attempts=3))
    await jobs.open(url)

    async def make(job, lain):
        if job.wanted.prompt == "poison":
            os.kill(os.getpid(), 9)
        await asyncio.sleep(0.02)
        for name in job.pictures:  # as a store does: the first of a name stays
            try:
                (home / name).open("x").close()
            except FileExistsError:
                pass

    jobs.work(make)
    await asyncio.sleep(600)

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def worker_process(server, home):
    return subprocess.Popen([sys.executable, "-c", WORKER, server.url, str(home)], stderr=subprocess.DEVNULL)


def test_nothing_is_lost_while_workers_and_nats_are_killed(server, tmp_path_factory):
    """60 jobs; a worker is killed -9 in mid-job three times, NATS twice. Each picture is there, and each job ended."""
    home = tmp_path_factory.mktemp("pictures")

    async def scenario():
        async with queue(server) as front:
            workers = [worker_process(server, home) for _ in range(2)]
            try:
                states = [await submitted(front, f"job {index}", key=str(index)) for index in range(60)]
                for turn in range(5):
                    enough = 8 * (turn + 1)
                    async with asyncio.timeout(BOUND):
                        while len(list(home.iterdir())) < enough:
                            await asyncio.sleep(0.02)
                    if turn in (1, 3):
                        await asyncio.to_thread(server.kill)
                        await asyncio.to_thread(server.start)
                    else:
                        workers[turn % 2].kill()
                        workers[turn % 2].wait()
                        workers[turn % 2] = worker_process(server, home)
                ended = [await over(front, state.id) for state in states]
                assert {state.status for state in ended} == {"completed"}
                assert sorted(path.name for path in home.iterdir()) == sorted(
                    name for state in states for name in state.pictures
                )
            finally:
                for process in workers:
                    process.kill()
                    process.wait()

    run(scenario())


def test_a_job_that_kills_its_workers_fails(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("pictures")

    async def scenario():
        async with queue(server) as front:
            state = await submitted(front, "poison")
            process = worker_process(server, home)
            try:
                async with asyncio.timeout(BOUND):
                    while not (await front.state("", state.id)).over:
                        if process.poll() is not None:
                            assert process.returncode == -signal.SIGKILL
                            process = worker_process(server, home)
                        await asyncio.sleep(0.05)
            finally:
                process.kill()
                process.wait()
            ended = await front.state("", state.id)
            assert (ended.status, ended.attempts) == ("failed", QUICK.attempts)

    run(scenario())


def test_without_nats_nothing_is_accepted(server, monkeypatch):
    monkeypatch.setattr("dynamo_epd.jobs.REQUEST_SECONDS", 1.0)

    async def scenario():
        async with queue(server) as front:
            state = await submitted(front)
            server.kill()
            with pytest.raises(StageUnavailable, match="whether the job was accepted is not known"):
                await submitted(front)
            with pytest.raises(StageUnavailable, match=r"^the job queue does not answer$"):
                await front.state("", state.id)
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(BOUND):
                while True:
                    with contextlib.suppress(StageUnavailable):
                        assert (await submitted(front)).status == "queued"
                        return
                    await asyncio.sleep(0.1)

    run(scenario())
