# SPDX-License-Identifier: Apache-2.0
"""The table of families against vLLM's own classes, so that it cannot rot unseen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_epd.errors import InvalidRequest
from dynamo_epd.families import FAMILIES, family_of, refuse_typed_placeholders

MODEL = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(model_type="clip_vision_model")))
"""All that the parsers of embeddings look at of a model: vLLM's LLaVA takes none with Pixtral's tower."""


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    """vLLM's class of each architecture, as an engine of ours finds it."""
    from dynamo_epd.engine.environment import prepare

    prepare({})
    from vllm import ModelRegistry

    from dynamo_epd.engine.plugin import register

    register()
    served = set(ModelRegistry.get_supported_archs())
    assert set(FAMILIES) <= served
    return {name: ModelRegistry.models[name].load_model_cls() for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_hand_off_is_what_vllm_takes(name: str, classes: dict[str, Any]) -> None:
    import torch

    grids = FAMILIES[name].decode_reads == "metadata"
    rows = torch.zeros((4, 8) if grids else (1, 4, 8))
    fields = {"image_embeds": rows} | ({"image_grid_thw": torch.tensor([[1, 4, 4]])} if grids else {})
    try:
        taken = classes[name]._parse_and_validate_image_input(MODEL, **fields) is not None
    except AssertionError:  # Gemma 3 says so
        taken = False
    assert taken == (FAMILIES[name].hand_off == "embedding")


@pytest.mark.parametrize("name", FAMILIES)
def test_decode_reads_the_grid_where_positions_depend_on_it(name: str, classes: dict[str, Any]) -> None:
    from vllm.model_executor.models.interfaces import supports_mrope

    assert (FAMILIES[name].decode_reads == "metadata") == supports_mrope(classes[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_texts_that_vllm_puts_for_an_image_are_refused(name: str, classes: dict[str, Any]) -> None:
    for number in (1, 2, 32):
        text = classes[name].get_placeholder_str("image", number)
        with pytest.raises(InvalidRequest) as refused:
            refuse_typed_placeholders(FAMILIES[name], ["harmless", f"what is {text}?"])
        assert refused.value.param == "messages"
    refuse_typed_placeholders(FAMILIES[name], ["an image", "<b>bold</b>", "a | b"])


VARYING = [
    name
    for name, family in FAMILIES.items()
    # A CLIP tower's embeddings are equally long.
    if family.hand_off == "embedding" and name != "LlavaForConditionalGeneration"
]


@pytest.mark.parametrize("name", VARYING)
def test_embeddings_of_several_lengths_meet_in_one_step(name: str, classes: dict[str, Any]) -> None:
    import torch

    if FAMILIES[name].decode_reads == "metadata":
        # One tensor of all rows, cut by the grids.
        grids = torch.tensor([[1, 4, 4], [1, 4, 6]])
        parsed = classes[name]._parse_and_validate_image_input(
            MODEL, image_embeds=torch.zeros(10, 8), image_grid_thw=grids
        )
        assert len(parsed["image_embeds"]) == 10
        return
    lengths = [4, 6]
    rows = [torch.full((length, 8), float(length)) for length in lengths]
    out = classes[name].embed_multimodal(object.__new__(classes[name]), image_embeds=rows)
    assert [len(one) for one in out] == lengths
    assert all(torch.equal(one, row) for one, row in zip(out, rows, strict=True))


def test_the_first_known_architecture_counts() -> None:
    assert family_of(["Unknown", "Llama4ForConditionalGeneration"]).hand_off == "pixels"


def test_an_unknown_architecture_is_named_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"VipLlavaForConditionalGeneration.*LlavaForConditionalGeneration"):
        family_of(["VipLlavaForConditionalGeneration"])
