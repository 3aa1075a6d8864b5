# SPDX-License-Identifier: Apache-2.0
"""``/v1/embeddings`` with OpenAI's client, on the trained T5, against plain transformers."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from components.embed_worker import AT_ONCE, MOST_CHARACTERS, PER_TEXT, SHORT, EmbedConfig, EmbedWorker, tokenized
from components.protocol import StatesRequest
from dynamo_epd import metrics
from dynamo_epd.errors import InvalidRequest
from dynamo_epd.failures import Hung
from dynamo_epd.sdk import dynamo_context
from dynamo_epd.text.t5 import TextEncoder
from models import world
from tests.fake_clock import FakeClock
from tests.serving import Graph, serve
from tests.toys.running import ROOT

MODEL = "tiny-t5"
DIRECTORY = ROOT / "models/tiny/t5"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    config = tmp_path_factory.mktemp("embedding") / "config.yaml"
    config.write_text(
        "EmbedWorker: {model: models/tiny/t5, served-model-name: tiny-t5, max-tokens: 64, ServiceArgs: {workers: 2}}"
    )
    with serve("tests.toys.embedding:Frontend", str(config)) as served:
        yield served


@pytest.fixture(scope="module")
def client(graph: Graph) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{graph.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def plain(texts: list[str]) -> np.ndarray:
    """The vectors by transformers' calls alone, one text at a time: float32 (texts, width)."""
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    model = T5EncoderModel.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def test_vectors_are_those_of_plain_transformers_in_order(client: openai.OpenAI) -> None:
    found = world.scenes(random.Random(5), held_out=True, pairs=0.5)
    texts = [next(found).caption for _ in range(40)] + ["star", "Ein ganz anderer Satz, länger als die anderen."]
    reply = client.embeddings.create(model=MODEL, input=texts)
    vectors = np.array([one.embedding for one in reply.data])
    assert [one.index for one in reply.data] == list(range(len(texts)))
    np.testing.assert_allclose(vectors, plain(texts), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    assert reply.usage.prompt_tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    assert reply.model == MODEL


def test_a_graph_without_chat_says_that_it_is_ready_and_names_its_model(client: openai.OpenAI, graph: Graph) -> None:
    assert [one.id for one in client.models.list()] == [MODEL]
    with urllib.request.urlopen(f"{graph.url}/health", timeout=60) as reply:
        assert json.load(reply) == {"status": "ready", "stages": {"Frontend": 1, "EmbedWorker": 2}}
    with pytest.raises(openai.NotFoundError, match="no chat model"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello?"}])


def test_base64_and_float_say_the_same(client: openai.OpenAI) -> None:
    by_default = client.embeddings.create(model=MODEL, input="a large red star on a blue background")
    as_floats = client.embeddings.create(
        model=MODEL, input="a large red star on a blue background", encoding_format="float"
    )
    np.testing.assert_allclose(by_default.data[0].embedding, as_floats.data[0].embedding, atol=1e-7)
    assert np.linalg.norm(as_floats.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_a_paraphrase_is_nearer_than_another_colour(client: openai.OpenAI) -> None:
    texts = [
        "a large red star on a blue background",
        "a picture of a big red star on blue",
        "a large green star on a blue background",
    ]
    caption, same, other = (np.array(one.embedding) for one in client.embeddings.create(model=MODEL, input=texts).data)
    assert caption @ same > caption @ other


def batch_sizes(graph: Graph) -> tuple[float, float]:
    """Batches that ran so far on both workers, and texts in them."""
    both = [graph.metrics("EmbedWorker", index) for index in range(2)]
    batches, texts = (sum(one.total(f"epd_embed_batch_size_{what}") for one in both) for what in ("count", "sum"))
    return batches, texts


def test_texts_of_many_clients_are_not_mixed_up(client: openai.OpenAI, graph: Graph) -> None:
    found = world.scenes(random.Random(6), held_out=True, pairs=0.5)
    texts = [next(found).caption for _ in range(96)]
    sizes = batch_sizes(graph)
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda text: client.embeddings.create(model=MODEL, input=text), texts))
    np.testing.assert_allclose(np.array([one.data[0].embedding for one in replies]), plain(texts), atol=1e-5)
    ran = [graph.metrics("EmbedWorker", index).total("epd_stage_run_seconds_count") for index in range(2)]
    assert all(ran), "both workers were asked"
    batches, embedded = (after - before for after, before in zip(batch_sizes(graph), sizes, strict=True))
    assert embedded == 96 > batches, "what waits together is embedded together"


@pytest.mark.parametrize("ids", [[5, -1], [5, 8], [5, 2**40]])
def test_what_is_no_token_never_reaches_a_batch(ids: list[int]) -> None:
    """There it would be its neighbours' failure too."""
    worker = object.__new__(EmbedWorker)
    vars(worker).update(config=EmbedConfig(model=MODEL), encoder=SimpleNamespace(vocabulary=8), batcher=None)

    async def asked() -> None:
        await anext(worker.states(StatesRequest("", ids, 1, masked=True)))

    with pytest.raises(InvalidRequest, match="no token"):
        asyncio.run(asked())


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": ""}, openai.BadRequestError, "input"),
        ({"input": ["a"] * 2049}, openai.BadRequestError, "input"),
        ({"input": [[1, 2, 3]]}, openai.BadRequestError, "input"),
        ({"input": [1, 2, 3]}, openai.BadRequestError, "input"),
        ({"input": "star " * 100}, openai.BadRequestError, "input"),
        ({"input": ["star", "star " * 100]}, openai.BadRequestError, "input[1]"),
        ({"input": "a", "dimensions": 8}, openai.BadRequestError, "dimensions"),
        ({"input": "a", "model": "no such"}, openai.NotFoundError, "model"),
    ],
)
def test_refusals(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.embeddings.create(**{"model": MODEL, **fields})
    assert caught.value.param == param
    if fields["input"] == [1, 2, 3]:
        assert "check_embedding_ctx_length=False" in str(caught.value)


def test_half_the_texts_wrong_embeds_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input=["a star", ""])


def test_a_text_of_too_many_characters_is_refused_unread() -> None:
    def read(text: str, param: str) -> list[int]:
        raise AssertionError("read")

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(tokenized(read, ["a star", "star " * 13 * 64], 64))
    assert (caught.value.param, caught.value.code) == ("input[1]", "text_too_long")


def test_no_piece_of_the_vocabulary_is_longer_than_the_bound_says() -> None:
    assert max(map(len, AutoTokenizer.from_pretrained(DIRECTORY).get_vocab())) <= MOST_CHARACTERS / 4


def test_requests_that_tokenize_at_once_do_not_disturb_each_other() -> None:
    encoder = TextEncoder(str(DIRECTORY), max_tokens=512)
    texts = ["a large red star on a blue background " * 8] * 40

    async def all_of() -> list[list[list[int]]]:
        return await asyncio.gather(*(tokenized(encoder.tokenize, texts, 512) for _ in range(16)))

    assert all(found == [encoder.tokenize(texts[0], "input")] * 40 for found in asyncio.run(all_of()))


@pytest.mark.parametrize("count", [1, 64])
def test_few_short_texts_are_tokenized_on_the_loop(count: int) -> None:
    def where(text: str, param: str) -> list[int]:
        return [threading.get_ident()]

    here = [threading.get_ident()]
    most = SHORT // count - PER_TEXT
    assert asyncio.run(tokenized(where, ["s" * most] * count, 512)) == [here] * count
    assert asyncio.run(tokenized(where, ["s" * (most + 1)] * count, 512))[0] != here


def test_token_ids_are_those_that_the_tokenizer_gives_when_it_is_called() -> None:
    encoder, tokenizer = TextEncoder(str(DIRECTORY)), AutoTokenizer.from_pretrained(DIRECTORY)
    for text in ("a large red star", "", " two  spaces\n", "Größe ﬁ ½ 星", "<pad></s> a", "x" * 300):
        assert encoder.tokenize(text, "input") == tokenizer(text).input_ids


def test_texts_are_tokenized_in_order_beside_the_loop_and_not_after_a_cancel() -> None:
    texts = [str(number) for number in range(5 * AT_ONCE)]
    free = threading.Event()
    seen: list[str] = []

    def slow(text: str, param: str) -> list[int]:
        assert free.wait(60), "the loop did not go on"
        assert param == f"input[{text}]"
        seen.append(text)
        return [int(text)]

    async def both() -> None:
        first = asyncio.create_task(tokenized(slow, texts, 64))
        await asyncio.sleep(0.01)
        free.set()
        assert await first == [[number] for number in range(len(texts))]
        free.clear()
        seen.clear()
        second = asyncio.create_task(tokenized(slow, texts, 64))
        await asyncio.sleep(0.01)
        second.cancel()
        free.set()
        await asyncio.gather(second, return_exceptions=True)

    asyncio.run(both())  # waits for its threads
    assert seen == texts[:AT_ONCE]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([64, *[2] * 90], [(4, 64)]),
        (list(range(21, 1, -1)), [(5, 48)]),
    ],
)
def test_batch_tokens_bound_a_forward_with_its_padding(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], expected: list[tuple[int, int]]
) -> None:
    """The texts weigh what one batch may weigh. Padded to the longest they would be more."""
    monkeypatch.setattr(metrics, "Metrics", MagicMock())
    monkeypatch.setitem(dynamo_context, "namespace", "tests")
    worker = object.__new__(EmbedWorker)
    config = EmbedConfig(str(DIRECTORY), batch_tokens=256)
    vars(worker).update(config=config, open_arena=AsyncMock(), arena=SimpleNamespace(stats=None))
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    async def main() -> None:
        await worker.start()
        worker.encoder._model.register_forward_pre_hook(note, with_kwargs=True)
        done = await worker.batcher.submit_all([[5] * length for length in lengths])
        assert [len(one.result.states) for one in done] == lengths
        worker.batcher.close()

    assert sum(lengths) <= 256 < len(lengths) * max(lengths)
    asyncio.run(main())
    assert sorted(shapes) == expected


def test_a_worker_whose_forward_hangs_says_that_it_does_not_live(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    monkeypatch.setattr(metrics, "Metrics", MagicMock())
    monkeypatch.setitem(dynamo_context, "namespace", "tests")
    worker = object.__new__(EmbedWorker)
    config = EmbedConfig(str(DIRECTORY), engine_silence=60.0)
    vars(worker).update(config=config, open_arena=AsyncMock(), arena=SimpleNamespace(stats=None))
    began, go = threading.Event(), threading.Event()

    def hang(module: Any, args: Any) -> None:
        began.set()
        assert go.wait(60)

    async def main() -> None:
        await worker.start()
        worker.encoder._model.register_forward_pre_hook(hang)
        asked = asyncio.create_task(worker.batcher.submit([5]))
        assert await asyncio.to_thread(began.wait, 60)
        clock.now += 60
        assert worker.alive()
        clock.now += 1
        with pytest.raises(Hung):
            worker.alive()
        go.set()
        await asked
        assert worker.alive()
        worker.batcher.close()

    asyncio.run(main())
