# SPDX-License-Identifier: Apache-2.0
"""`TextEncoder` by its own name and by that of a pipeline that has a T5."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTextEncoding, AutoTokenizer, MT5Config, T5EncoderModel, UMT5Config

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.text.t5 import Place, TextEncoder, find, forwards
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


def shapes(encoder: TextEncoder) -> list[tuple[int, int]]:
    """(rows, width) of each forward from now on."""
    seen: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    encoder._model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def assert_as_alone(encoder: TextEncoder, texts: list[list[int]]) -> None:
    """What a text gives among these it gives by itself."""
    for text, one in zip(texts, encoder.encode(texts), strict=True):
        (alone,) = encoder.encode([text])
        assert one.states.shape == (len(text), alone.states.shape[1])
        torch.testing.assert_close(one.states, alone.states, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.vector, alone.vector, atol=1e-5, rtol=1e-4)


def drawn(lengths: list[int]) -> list[list[int]]:
    chance = torch.Generator().manual_seed(5)
    return [torch.randint(3, 100, (length,), generator=chance).tolist() for length in lengths]


def test_texts_share_rows_and_attend_to_themselves_alone() -> None:
    """In forwards that hold no more than the bound, and hardly a token of padding, whatever their lengths."""
    encoder = TextEncoder(str(T5), batch_tokens=512)
    lengths = [2] * 150 + [128, 600] + [2] * 150 + [40, 9] * 10
    seen = shapes(encoder)
    encoder.encode(drawn(lengths))
    assert (1, 600) in seen, "what is longer than the bound runs alone"
    assert all(rows * width <= 512 for rows, width in seen if width != 600)
    assert sum(rows * width for rows, width in seen) <= 1.05 * sum(lengths)
    assert len(seen) <= 5
    assert_as_alone(encoder, drawn(lengths))


def test_a_lone_text_is_what_transformers_says() -> None:
    encoder, model = TextEncoder(str(T5)), AutoModelForTextEncoding.from_pretrained(T5).eval()
    for length in (1, 7, 300):
        (text,) = drawn([length])
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([text])).last_hidden_state[0]
        (found,) = encoder.encode([text])
        torch.testing.assert_close(found.states, states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.vector, torch.nn.functional.normalize(states.mean(0), dim=0))


@pytest.mark.parametrize("kind", [MT5Config, UMT5Config])
def test_t5s_with_other_attention_share_rows_too(tmp_path: Path, kind: Any) -> None:
    """UMT5 has a position bias in every layer."""
    shutil.copytree(T5, tmp_path / "t5", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(3)
    sizes = {"vocab_size": 700, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    AutoModelForTextEncoding.from_config(kind(**sizes)).save_pretrained(tmp_path / "t5")
    assert_as_alone(TextEncoder(str(tmp_path / "t5")), drawn([3, 30, 9, 9, 60, 17]))


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([7], 16384, [[[0]]]),
        ([7], 4, [[[0]]]),
        ([9, 5, 21, 13], 16384, [[[2, 3, 0, 1]]]),
        ([40, 30, 18, 8], 16384, [[[0, 3], [1, 2]]]),
        ([512, 512, 512, 2, 2], 1024, [[[0], [1]], [[2], [3, 4]]]),
        ([600, 2, 40], 512, [[[0]], [[2, 1]]]),
        ([9, 9, 9], 16, [[[0]], [[1]], [[2]]]),
    ],
)
def test_rows_are_filled_with_what_fits_best(lengths: list[int], most: int, expected: list[list[list[int]]]) -> None:
    assert forwards(lengths, most) == expected
