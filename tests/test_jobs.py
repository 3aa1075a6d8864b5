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

import pytest

from dynamo_epd.errors import InvalidRequest, NotFound, Overloaded, StageUnavailable
from dynamo_epd.http.images import check_images
from dynamo_epd.jobs import JobQueue, JobsConfig, KeyReused
from dynamo_epd.sdk.nats_server import nats_binary

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


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 2 * BOUND))


def test_a_job_is_queued_runs_and_is_completed(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            state = await submitted(front, n=3)
            assert (await front.state("", state.id)).status == "queued"
            seen = []

            async def make(job):
                seen.append((job.id, job.pictures, job.wanted.prompt, (await front.state("", job.id)).status))

            worker.work(make)
            ended = await over(front, state.id)
            assert (ended.status, ended.attempts, ended.error) == ("completed", 1, None)
            assert seen == [(state.id, state.pictures, "a red star", "in_progress")]
            assert len(set(state.pictures)) == 3

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

            async def make(job):
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


def test_a_refusal_ends_the_job_and_what_is_away_does_not(server):
    async def scenario():
        async with queue(server) as front, queue(server) as worker:
            away = [StageUnavailable("the store is away")] * 5

            async def make(job):
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


def test_a_worker_that_leaves_gives_its_job_back(server):
    async def scenario():
        async with queue(server) as front:
            state = await submitted(front)
            begun = asyncio.Event()

            async def long(job):
                begun.set()
                await asyncio.sleep(BOUND)

            async with queue(server) as leaving:
                leaving.work(long)
                await begun.wait()
            assert (await front.state("", state.id)).status == "queued"

            async def make(job):
                pass

            async with queue(server) as worker:
                worker.work(make)
                assert (await over(front, state.id)).attempts == 1

    run(scenario())


WORKER = """
import asyncio, os, sys
from pathlib import Path
from dynamo_epd.jobs import JobQueue, JobsConfig

async def main(url, home):
    jobs = JobQueue("tests", JobsConfig(silence_seconds=1.0, retry_seconds=0.2, attempts=3))
    await jobs.open(url)

    async def make(job):
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


def test_without_nats_nothing_is_accepted(server):
    async def scenario():
        async with queue(server) as front:
            server.kill()
            with pytest.raises(StageUnavailable):
                await submitted(front)
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(BOUND):
                while True:
                    with contextlib.suppress(StageUnavailable):
                        assert (await submitted(front)).status == "queued"
                        return
                    await asyncio.sleep(0.1)

    run(scenario())
