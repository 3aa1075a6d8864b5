# SPDX-License-Identifier: Apache-2.0
"""Vision towers and projectors of toy checkpoints against transformers' own. One process loads them all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from models import untrained

TOWERS = {
    "llava": ("vision_tower.", "multi_modal_projector."),
    "llava_next": ("vision_tower.", "multi_modal_projector.", "image_newline", "model.image_newline"),
    "qwen2_5_vl": ("visual.", "model.visual."),
    "qwen3_vl": ("visual.", "model.visual."),
    "internvl": ("vision_tower.", "multi_modal_projector."),
}
"""Families that hand on embeddings, with the tensors of a checkpoint that are their tower and projector."""

PLACEHOLDERS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
}

SIZES = ((80, 80), (60, 160), (160, 60), (200, 200), (80, 80), (45, 90))
"""(height, width) of pictures that share a batch."""


def picture(seed: int, height: int, width: int) -> Image.Image:
    blocks = numpy.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=numpy.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


PICTURES = [picture(seed, height, width) for seed, (height, width) in enumerate(SIZES)]


@dataclass(frozen=True)
class Loaded:
    """One encoder, and what was read for it."""

    directory: Path
    encoder: Any
    nbytes: int
    """Of parameters, when the weights were read and nothing was packed for the device yet."""
    modules: frozenset[str]
    """Top-level modules that hold parameters."""


def engine_args(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(directory),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 8},
        **more,
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for family in (*TOWERS, "llama4"):
        untrained.write(family, root / family)
    return {family: root / family for family in (*TOWERS, "llama4")}


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> dict[str, Loaded]:
    from dynamo_epd.engine.environment import prepare

    prepare(engine_args(checkpoints["llava"]))
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from dynamo_epd.engine.encoder import load_encoder

    parameters: dict[str, Any] = {}
    read = DefaultModelLoader.load_weights

    def read_and_count(loader: Any, model: Any, config: Any) -> None:
        read(loader, model, config)
        parameters.clear()
        parameters.update({name: one for name, one in model.named_parameters() if one.device.type != "meta"})

    towers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultModelLoader, "load_weights", read_and_count)
        for family in TOWERS:
            encoder = load_encoder(engine_args(checkpoints[family], tensor_parallel_size=4))
            nbytes = sum(one.numel() * one.element_size() for one in parameters.values())
            modules = frozenset(name.partition(".")[0] for name in parameters)
            towers[family] = Loaded(checkpoints[family], encoder, nbytes, modules)
    return towers


@pytest.mark.parametrize("family", TOWERS)
def test_embeddings_are_those_of_transformers(family: str, loaded: dict[str, Loaded]) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    one = loaded[family]
    model = AutoModelForImageTextToText.from_pretrained(one.directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(one.directory)
    for image in PICTURES:
        inputs = processor(images=[image], text=[PLACEHOLDERS[family]], return_tensors="pt")
        fields = {key: inputs[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs}
        with torch.inference_mode():
            features = model.get_image_features(**fields)
        rows = features.pooler_output
        expected = rows.flatten(0, 1) if torch.is_tensor(rows) else rows[0]
        if family == "qwen3_vl":
            expected = torch.cat([expected, *features.deepstack_features], dim=1)
        (embedding,) = one.encoder.embed([one.encoder.process(image)])
        assert embedding.shape == expected.shape
        assert expected.std() > 0.01
        torch.testing.assert_close(embedding, expected, atol=2e-4, rtol=1e-3)


def test_a_picture_is_as_large_as_the_tokens_that_its_tower_sees(loaded: dict[str, Loaded]) -> None:
    for image in PICTURES:
        for family in ("llava", "qwen2_5_vl", "qwen3_vl"):
            encoder = loaded[family].encoder
            item = encoder.process(image)
            grid = encoder.metadata(item).get("image_grid_thw")
            assert encoder.patches(item) == (math.prod(grid) if grid else len(encoder.embed([item])[0])), family
        tiled = loaded["llava_next"].encoder
        (tiles,) = {len(value.data) for name, value in tiled.process(image).items() if name == "pixel_values"}
        one_tile = loaded["llava"].encoder.patches(loaded["llava"].encoder.process(image))
        assert tiled.patches(tiled.process(image)) == tiles * one_tile


@pytest.mark.parametrize("family", TOWERS)
def test_only_tower_and_projector_are_loaded(family: str, loaded: dict[str, Loaded]) -> None:
    from safetensors import safe_open

    one = loaded[family]
    tower = everything = 0
    with safe_open(one.directory / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            size = tensors.get_tensor(name).nbytes
            everything += size
            tower += size if name.startswith(TOWERS[family]) else 0
    assert one.modules <= {prefix.strip(".").rpartition(".")[2] for prefix in TOWERS[family]}
    # Less than all of it where a tower's last layer is never read (LLaVA).
    assert 0.6 * tower <= one.nbytes <= 1.1 * tower
    assert one.nbytes < 0.8 * everything


@pytest.mark.parametrize("family", TOWERS)
def test_a_batch_of_several_sizes_is_what_its_pictures_are_alone(family: str, loaded: dict[str, Loaded]) -> None:
    import torch

    encoder = loaded[family].encoder
    items = [encoder.process(image) for image in PICTURES]
    together = encoder.embed(items)
    assert len(together) == len(PICTURES)
    for item, embedding in zip(items, together, strict=True):
        torch.testing.assert_close(embedding, encoder.embed([item])[0], atol=1e-5, rtol=1e-4)
    for first, second in pairwise(together):
        assert first.shape != second.shape or not torch.allclose(first, second, atol=1e-2)


def test_metadata_is_the_grid_where_positions_depend_on_it(loaded: dict[str, Loaded]) -> None:
    for family, one in loaded.items():
        for image in PICTURES:
            item = one.encoder.process(image)
            metadata = one.encoder.metadata(item)
            if not family.startswith("qwen"):
                assert metadata == {}
                continue
            assert list(metadata) == ["image_grid_thw"]
            frames, rows, columns = metadata["image_grid_thw"]
            assert frames * rows * columns // 4 == len(one.encoder.embed([item])[0])
            assert (rows > columns) == (image.height > image.width)


def test_processor_arguments_bound_the_tokens(loaded: dict[str, Loaded]) -> None:
    """What the configurations of Qwen rely on."""
    from dynamo_epd.engine.encoder import load_encoder

    most = 9
    bounds = {"min_pixels": 28 * 28, "max_pixels": most * 28 * 28}
    bounded = load_encoder(engine_args(loaded["qwen2_5_vl"].directory, mm_processor_kwargs=bounds))
    free = loaded["qwen2_5_vl"].encoder
    large = picture(9, 200, 190)
    assert len(bounded.embed([bounded.process(large)])[0]) <= most < len(free.embed([free.process(large)])[0])


def test_the_model_may_refuse_a_picture(loaded: dict[str, Loaded]) -> None:
    with pytest.raises(ValueError, match=r"^absolute aspect ratio must be smaller than 200"):
        loaded["qwen2_5_vl"].encoder.process(picture(0, 1, 1000))


def test_pixels_are_handed_on_where_vllm_takes_no_embeddings(checkpoints: dict[str, Path]) -> None:
    import torch

    from dynamo_epd.engine.encoder import PixelEncoder, load_encoder
    from dynamo_epd.engine.language import ImageInput, multi_modal_data

    encoder = load_encoder(engine_args(checkpoints["llama4"]))
    assert isinstance(encoder, PixelEncoder)
    items = [encoder.process(image) for image in PICTURES]
    tensors = encoder.embed(items)
    assert [tuple(one.shape) for one in tensors] == [(height, width, 3) for height, width in SIZES]
    assert all(one.dtype == torch.uint8 for one in tensors)
    assert [encoder.metadata(item) for item in items] == [{}] * len(items)
    again = multi_modal_data([ImageInput(str(index), one) for index, one in enumerate(tensors)])
    assert [one.tobytes() for one in again] == [image.tobytes() for image in PICTURES]
