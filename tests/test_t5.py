# SPDX-License-Identifier: Apache-2.0
"""`TextEncoder` by its own name and by that of a pipeline that has a T5."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5EncoderModel

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.text.t5 import FORWARD_TOKENS, Place, TextEncoder, find, forwards
from tests.serving import untrained
from tests.toys.running import ROOT

T5 = ROOT / "models/tiny/t5"
TEXTS = ("a large red star on a blue background", "x", "")


@pytest.mark.parametrize(("family", "number"), [("pixart", ""), ("flux", "_2"), ("flux_schnell", "_2"), ("sd3", "_3")])
def test_the_t5_of_a_pipeline_is_found(family: str, number: str) -> None:
    directory = str(untrained(family))
    assert find(directory) == Place(directory, f"text_encoder{number}", f"tokenizer{number}")


def test_the_t5_of_a_pipeline_is_run_with_its_tokenizer() -> None:
    directory = untrained("sd3")
    tokenizer = AutoTokenizer.from_pretrained(directory, subfolder="tokenizer_3")
    model = T5EncoderModel.from_pretrained(directory, subfolder="text_encoder_3").eval()
    encoder = TextEncoder(str(directory))
    for text in TEXTS:
        (found,) = encoder.encode([encoder.tokenize(text, "input")])
        with torch.inference_mode():
            states = model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(found.states, states)


def test_a_pipeline_without_a_t5_says_so() -> None:
    with pytest.raises(ConfigError, match="has no T5"):
        TextEncoder(str(untrained("sdxl")))


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no T5 but 'clip_text_model'"):
        TextEncoder(str(untrained("sdxl") / "text_encoder"))


def test_what_cannot_be_loaded_is_an_error_in_one_line(tmp_path: Path) -> None:
    for name in ("/no/such", str(tmp_path), str(ROOT / "README.md")):
        with pytest.raises(ConfigError) as caught:
            TextEncoder(name)
        assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    directory = shutil.copytree(T5, tmp_path / "t5")
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for encoder\.final_layer_norm"):
        TextEncoder(str(directory))


def padded(encoder: TextEncoder) -> list[tuple[int, int]]:
    """(rows, longest) of each forward from now on."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    encoder._model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_no_forward_has_more_tokens_than_the_bound_its_padding_counted() -> None:
    """One long text among short ones would pad all of them to its length."""
    encoder = TextEncoder(str(T5), batch_tokens=512)
    seen = padded(encoder)
    chance = torch.Generator().manual_seed(5)
    lengths = [2] * 150 + [128, 600] + [2] * 150 + [40, 9] * 10
    texts = [torch.randint(3, 100, (length,), generator=chance).tolist() for length in lengths]
    found = encoder.encode(texts)
    assert sum(rows for rows, _ in seen) == len(texts)
    assert all(rows * longest <= 512 for rows, longest in seen if rows > 1)
    assert (1, 600) in seen, "what is longer than the bound runs alone"
    assert len(seen) <= 7, "neighbours by length run together"
    for text, one in zip(texts, found, strict=True):
        (alone,) = encoder.encode([text])
        assert one.states.shape == (len(text), alone.states.shape[1])
        torch.testing.assert_close(one.states, alone.states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.vector, alone.vector, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "most", "groups"),
    [
        ([7], 16384, [[0]]),
        ([7], 4, [[0]]),
        ([9, 5, 21, 14], 16384, [[1, 0, 3, 2]]),
        ([512, 512, 512], 1024, [[0, 1], [2]]),
        ([512, 2, 2], 16384, [[1, 2], [0]]),  # 1,020 tokens of padding
        ([3 + FORWARD_TOKENS, 3], 16384, [[1, 0]]),
        ([4 + FORWARD_TOKENS, 3], 16384, [[1], [0]]),
    ],
)
def test_a_forward_more_is_run_where_padding_would_cost_more(
    lengths: list[int], most: int, groups: list[list[int]]
) -> None:
    assert forwards(lengths, most) == groups
