# SPDX-License-Identifier: Apache-2.0
"""The disaggregated graph on real engines: the same answers as one plain engine, and nothing mixed up."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.picture_server import PictureServer
from tests.questions import Refused, Said, ask, ask_all, assert_same, chat, data_url, picture, post, question, user
from tests.reference import NAME, Reference
from tests.serving import Graph, Metrics, at_rest

IDLE_WAKES = 6000
"""A second: what the whole graph may cost at rest, in wakes of a process that sleeps, which cost more on a slow machine
too. That it is less than a tenth of a core is row 1's to show, in benchmarks/."""
SLEEPER = """
import time
end, began, wakes = time.monotonic() + 10, time.process_time(), 0
while time.monotonic() < end:
    time.sleep(0.002)
    wakes += 1
print((time.process_time() - began) / wakes)
"""
"""Prints the CPU seconds of one wake."""


def one_picture(seed: int, text: str = "What is in this image?") -> dict[str, object]:
    return chat(user(text, data_url(picture(seed))))


def test_answers_are_those_of_the_plain_engine(disagg: Graph, reference: Reference) -> None:
    questions = [question(seed) for seed in range(24)]
    expected = ask_all(reference.url, questions, model=NAME)
    assert_same(expected, ask_all(disagg.url, questions))
    assert_same(expected, ask_all(disagg.url, questions, at_once=16))  # and from caches


def test_64_pictures_at_once_are_not_mixed_up(disagg: Graph) -> None:
    """Cold caches first: at once before one by one."""
    questions = [one_picture(10_000 + number) for number in range(64)]
    together = ask_all(disagg.url, questions, at_once=64)
    alone = ask_all(disagg.url, questions)
    assert_same(alone, together)
    assert len({said.text for said in alone}) > 60, "answers do not depend on the picture: this test would see nothing"


def test_warm_workers_see_another_picture_under_the_same_text(disagg: Graph, reference: Reference) -> None:
    text = "Describe the whole scene, from its left to its right, and every colour that there is. " * 4
    questions = [one_picture(20_000 + number % 3, text) for number in range(6)]
    expected = ask_all(reference.url, questions, model=NAME)
    assert len({said.text for said in expected}) == 3
    assert_same(expected, ask_all(disagg.url, questions))


def test_order_of_pictures_is_kept(disagg: Graph, reference: Reference) -> None:
    urls = [data_url(picture(25_000 + number)) for number in range(3)]
    questions = [
        chat(user("Which is first?", *(urls[index] for index in order))) for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1))
    ]
    expected = ask_all(reference.url, questions, model=NAME)
    assert len({said.text for said in expected}) == 3
    assert_same(expected, ask_all(disagg.url, questions))


def test_one_address_with_new_content_is_a_new_picture(disagg: Graph) -> None:
    with PictureServer() as server:
        for seed in (30_000, 30_001, 30_000):
            url = server.put("same.png", picture(seed))
            assert_same(
                [ask(disagg.url, one_picture(seed))], [ask(disagg.url, chat(user("What is in this image?", url)))]
            )
        lower, upper = server.put("name.png", picture(30_002)), server.put("NAME.png", picture(30_003))
        said = ask_all(disagg.url, [chat(user("What is in this image?", url)) for url in (lower, upper)])
        assert_same(ask_all(disagg.url, [one_picture(30_002), one_picture(30_003)]), said)


def test_the_same_bytes_at_two_sizes_are_two_pictures(disagg: Graph, reference: Reference) -> None:
    """The same pixels in the same order, as 80×40 and as 40×80."""
    pixels = Image.open(io.BytesIO(picture(40_000, (80, 40)))).tobytes()
    questions = []
    for size in ((80, 40), (40, 80)):
        file = io.BytesIO()
        Image.frombytes("RGB", size, pixels).save(file, "PNG")
        questions.append(chat(user("What is in this image?", data_url(file.getvalue()))))
    expected = ask_all(reference.url, questions, model=NAME)
    assert expected[0].text != expected[1].text
    assert_same(expected, ask_all(disagg.url, questions))


def test_one_picture_many_times_is_encoded_once(disagg: Graph) -> None:
    before = disagg.metrics("EncodeWorker")
    questions = [chat(user(f"Question {number}", data_url(picture(50_000)))) for number in range(12)]
    ask_all(disagg.url, questions, at_once=12)
    after = disagg.metrics("EncodeWorker")
    encoded = after.total("epd_encode_batch_size_sum") - before.total("epd_encode_batch_size_sum")
    assert encoded == 1


def test_bytes_of_a_hand_off_go_over_nixl_and_only_there(disagg: Graph) -> None:
    """16 rows of 64 float32 from encode to prefill; the file from frontend to encode; nothing of it to decode."""
    file = picture(51_000)
    stages = ("EncodeWorker", "PrefillWorker", "DecodeWorker")
    before = [disagg.metrics(stage).total("nixl_transfer_bytes_total") for stage in stages]
    ask(disagg.url, chat(user("Where do my bytes go?", data_url(file))))
    after = [disagg.metrics(stage).total("nixl_transfer_bytes_total") for stage in stages]
    assert [now - then for now, then in zip(after, before, strict=True)] == [len(file), 16 * 64 * 4, 0]


def test_usage_counts_image_tokens(disagg: Graph) -> None:
    without = ask(disagg.url, chat(user("hello"))).prompt_tokens
    with_two = ask(disagg.url, chat(user("hello", data_url(picture(1)), data_url(picture(2))))).prompt_tokens
    assert with_two == without + 2 * (16 + len("\n"))


def test_health_lists_every_stage(disagg: Graph) -> None:
    with urllib.request.urlopen(f"{disagg.url}/health") as reply:
        text = reply.read().decode()
    for stage in ("Frontend", "Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker"):
        assert f'"{stage}":1' in text.replace(" ", ""), text
    with urllib.request.urlopen(f"{disagg.url}/live") as reply:
        assert reply.status == 200


def test_metrics_have_their_names_and_labels(disagg: Graph) -> None:
    ask(disagg.url, one_picture(60_000))
    labels = {"dynamo_namespace", "dynamo_component", "model"}
    expected = {
        "Frontend": {"epd_request_duration_seconds_count", "epd_requests_total"},
        "Processor": {"epd_time_to_first_token_seconds_count", "epd_inter_token_latency_seconds_count"},
        "EncodeWorker": {
            "epd_stage_queue_depth",
            "epd_stage_queue_seconds_count",
            "epd_stage_run_seconds_count",
            "epd_encode_batch_size_count",
            "epd_embedding_cache_hits_total",
            "epd_embedding_cache_bytes",
            "nixl_transfer_bytes_total",
            "nixl_transfer_seconds_sum",
        },
        "PrefillWorker": {"epd_stage_queue_depth", "epd_stage_run_seconds_count", "nixl_transfer_bytes_total"},
        "DecodeWorker": {"epd_stage_queue_depth", "epd_stage_run_seconds_count", "nixl_transfer_bytes_total"},
    }
    for service, names in expected.items():
        metrics = disagg.metrics(service)
        assert names <= metrics.names, names - metrics.names
        for name, found, _ in metrics.samples:
            if name in names:
                assert all(f'{label}="' in found for label in labels), f"{name}{{{found}}}"
                assert f'dynamo_component="{service}"' in found
    public = Metrics.scrape(f"{disagg.url}/metrics")
    assert public.total("epd_requests_total", 'status="200"') > 0


def test_the_clients_request_id_comes_back(disagg: Graph) -> None:
    name = f"mine-{uuid.uuid4().hex}"
    request = urllib.request.Request(f"{disagg.url}/v1/models", headers={"x-request-id": name})
    with urllib.request.urlopen(request) as reply:
        assert reply.headers["x-request-id"] == name
    with urllib.request.urlopen(f"{disagg.url}/v1/models") as reply:
        assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "field",
    [
        {"kv_transfer_params": {"remote_host": "127.0.0.1", "remote_port": 9}},
        {"cache_salt": "mine"},
        {"mm_processor_kwargs": {}},
        {"chat_template": "{{ 1 }}"},
        {"request_id": "theirs"},
        {"vllm_xargs": {}},
        {"prompt_embeds": "AAAA"},
    ],
)
def test_fields_that_only_the_inside_may_set_are_refused(disagg: Graph, field: dict[str, object]) -> None:
    with pytest.raises(Refused) as refused:
        post(f"{disagg.url}/v1/chat/completions", one_picture(1) | field)
    assert refused.value.status == 400
    assert refused.value.error["code"] == "unsupported_parameter"
    assert refused.value.error["param"] == next(iter(field))


def test_a_placeholder_typed_as_text_is_refused(disagg: Graph) -> None:
    for message in (user("look: <image>"), user("<image>", data_url(picture(1)))):
        with pytest.raises(Refused, match="image_url parts") as refused:
            ask(disagg.url, chat(message))
        assert refused.value.status == 400
    assert ask(disagg.url, chat(user("look: <imag e>"))).tokens


def test_a_prompt_that_is_too_long_says_so(disagg: Graph) -> None:
    with pytest.raises(Refused) as refused:
        ask(disagg.url, chat(user("x" * 2040, data_url(picture(1)))))
    assert refused.value.status == 400
    assert "2048" in refused.value.error["message"]
    at_rest(disagg, 5)


def test_a_refused_picture_leaves_its_neighbours_alone(disagg: Graph) -> None:
    good = data_url(picture(70_000))
    with pytest.raises(Refused) as refused:
        ask(disagg.url, chat(user("both?", good, data_url(b"no picture at all"))))
    assert refused.value.status in (400, 415)
    assert refused.value.size < 2048
    assert ask(disagg.url, chat(user("this one", good))).tokens
    at_rest(disagg, 5)


def test_at_rest_nothing_is_held_and_little_is_burnt(disagg: Graph) -> None:
    """Taken over ten seconds; what other work on this machine disturbs may be measured again."""
    at_rest(disagg, 15)

    def cost() -> float:
        before, since = disagg.cpu_seconds(), time.monotonic()
        wake = subprocess.run([sys.executable, "-c", SLEEPER], capture_output=True, text=True, check=True)
        return (disagg.cpu_seconds() - before) / (time.monotonic() - since) / float(wake.stdout)

    costs: list[float] = []
    end = time.monotonic() + 60
    while not costs or costs[-1] >= IDLE_WAKES:
        assert time.monotonic() < end, f"as many wakes a second at rest: {[f'{one:.0f}' for one in costs]}"
        costs.append(cost())


def test_no_engine_is_bound_to_one_core(disagg: Graph) -> None:
    """vLLM's NIXL connector would bind prefill and decode to the same one, and one would starve the other."""
    every = os.sched_getaffinity(0)
    bound = {process.pid: process.cpu_affinity() for process in disagg.tree() if set(process.cpu_affinity()) != every}
    assert not bound


def test_nobody_interrupts_who_works(disagg: Graph) -> None:
    workers = [
        process for process in disagg.tree() if process.pid != disagg.process.pid and "nats" not in process.name()
    ]
    policies = {
        os.sched_getscheduler(int(thread.name))
        for worker in workers
        for thread in Path(f"/proc/{worker.pid}/task").iterdir()
    }
    assert policies == {os.SCHED_BATCH}


def test_an_unknown_path_or_method_has_the_same_kind_of_body(disagg: Graph) -> None:
    for path, status in (("/nowhere", 404), ("/v1/chat/completions", 405)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{disagg.url}{path}")
        assert refused.value.code == status
        assert b'"error"' in refused.value.read()


def test_what_is_asked_for_is_what_is_sampled(disagg: Graph, reference: Reference) -> None:
    """Sampling parameters reach the engine: what they change in the plain engine they change here, alike."""
    body = one_picture(80_000, "Tell a story.")
    greedy = ask(reference.url, body, model=NAME)
    fields: list[dict[str, Any]] = [{"logit_bias": {str(token): 100}} for token in (65, 66)] + [
        {"max_tokens": 3},
        {"presence_penalty": 2, "max_tokens": 24},
        {"frequency_penalty": 2, "max_tokens": 24},
        {"repetition_penalty": 1.5, "max_tokens": 24},
        {"stop": [greedy.tokens[5].text]} if greedy.tokens[5].text.isprintable() else {"stop_token_ids": [0]},
        {"min_tokens": 2, "ignore_eos": True},
        {"top_logprobs": 2, "max_tokens": 30},
    ]
    expected = [ask(reference.url, body | one, model=NAME) for one in fields]
    got = [ask(disagg.url, body | one) for one in fields]
    assert_same(expected, got)
    assert len({said.text for said in expected}) > 3


def test_a_seed_makes_sampling_repeatable(disagg: Graph) -> None:
    body = one_picture(81_000, "Tell a story.") | {"temperature": 1.0, "max_tokens": 16}

    def text(seed: int) -> Said:
        return ask(disagg.url, body, seed=seed)

    assert text(1).text == text(1).text
    assert len({text(seed).text for seed in range(6)}) > 1
