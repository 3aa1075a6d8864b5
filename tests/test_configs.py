# SPDX-License-Identifier: Apache-2.0
"""Every file of configs/ against its graph, the real engine's arguments and the table of families."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd.families import Family, family_of
from dynamo_epd.sdk.config import ConfigError, Document, ServiceSettings, resolve
from dynamo_epd.sdk.gpus import TooFewGpus, gpus_for
from dynamo_epd.sdk.graph import load_graph
from tests.toys.running import clean_environment

ROOT = Path(__file__).parent.parent
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SEED = ["agg-llava", "agg-phi3v", "agg-qwen", "disagg"]
"""Names that commands written for the old examples use."""
ENGINES = ("Processor", "EncodeWorker", "PrefillWorker", "DecodeWorker")
"""Services whose sections hold engine arguments."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What the hub's ``config.json`` of a model says, and what a picture costs at most.

    Attributes:
        model_type, architecture: as in ``config.json``.
        remote: its configuration is code of the checkpoint's own.
        tokens: of one picture, at most.
        width: of an embedding, 0 where pixels are handed on.
    """

    model_type: str
    architecture: str
    remote: bool = False
    tokens: int = 0
    width: int = 0


HUB = {
    "llava-hf/llava-1.5-7b-hf": Checkpoint("llava", "LlavaForConditionalGeneration", tokens=576, width=4096),
    "Qwen/Qwen2.5-VL-7B-Instruct": Checkpoint(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", tokens=1280, width=3584
    ),
    "microsoft/Phi-3.5-vision-instruct": Checkpoint(
        "phi3_v", "Phi3VForCausalLM", remote=True, tokens=5 * 144 + 1 + 5 * 12, width=3072
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": Checkpoint(
        "llama4", "Llama4ForConditionalGeneration", tokens=17 * 144
    ),
}


@dataclasses.dataclass(frozen=True)
class Painter:
    """What the hub's ``model_index.json`` says of an image pipeline, and what its parts are made of.

    Attributes:
        pipeline: diffusers' class.
        side: of the squares of pixels that width and height must be made of.
        conditioned_by: embed models that are the pipeline's own T5.
        tokens, width: of the states of one prompt.
    """

    pipeline: str
    side: int
    conditioned_by: tuple[str, ...]
    tokens: int
    width: int


PAINTERS = {
    "black-forest-labs/FLUX.1-dev": Painter("FluxPipeline", 16, ("city96/t5-v1_1-xxl-encoder-bf16",), 512, 4096)
}


def graph_of(name: str) -> str:
    graph = next((graph for graph in ("disagg", "cova") if graph in name), "agg")
    return f"graphs.{graph}:Frontend"


def settle(path: Path, graph: str) -> dict[str, ServiceSettings]:
    document = Document()
    document.read(path)
    return resolve(load_graph(graph, str(ROOT)), document)


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(name: str) -> dict[str, ServiceSettings]:
    return settle(ROOT / "configs" / f"{name}.yaml", graph_of(name))


@pytest.fixture(params=[name for name in FILES if not name.startswith("tiny")])
def hub(request: pytest.FixtureRequest) -> dict[str, ServiceSettings]:
    return settle(ROOT / "configs" / f"{request.param}.yaml", graph_of(request.param))


@pytest.fixture(params=[name for name in FILES if "cova" in name])
def painting(request: pytest.FixtureRequest) -> dict[str, ServiceSettings]:
    """A file of the content-validation graph."""
    return settle(ROOT / "configs" / f"{request.param}.yaml", graph_of(request.param))


@pytest.fixture(params=[name for name in FILES if name.startswith("cova")])
def cova(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wide(cova: str) -> dict[str, ServiceSettings]:
    """The same, with models from the hub."""
    return settle(ROOT / "configs" / f"{cova}.yaml", graph_of(cova))


@pytest.fixture(scope="module", autouse=True)
def online() -> Iterator[None]:
    """Another test may have told this process that the hub is out of reach; vLLM would then look for local copies."""
    import huggingface_hub.constants

    from dynamo_epd.engine.environment import prepare

    prepare({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield


def engine_args(settings: dict[str, ServiceSettings]) -> dict[str, dict[str, Any]]:
    return {name: one.config.engine_args for name, one in settings.items() if name in ENGINES}


def checkpoint_of(settings: dict[str, ServiceSettings]) -> Checkpoint:
    return HUB[settings["Processor"].config.engine_args["model"]]


def family(settings: dict[str, ServiceSettings]) -> Family:
    return family_of([checkpoint_of(settings).architecture])


def takes_pictures(settings: dict[str, ServiceSettings]) -> ServiceSettings:
    """Whoever prefills READs the pictures."""
    return settings.get("PrefillWorker") or settings["DecodeWorker"]


def test_the_seeds_files_are_there() -> None:
    assert set(SEED) < set(FILES)
    assert {"tiny-agg", "tiny-disagg", "tiny-cova", "cova", "cova-llama4"} < set(FILES)


def test_every_service_has_its_section_and_the_same_model(settings: dict[str, ServiceSettings]) -> None:
    args = engine_args(settings)
    (model,) = {one["model"] for one in args.values()}
    assert len(args) == (4 if "PrefillWorker" in settings else 3)
    for key in ("dtype", "max_model_len", "limit_mm_per_prompt", "mm_processor_kwargs", "trust_remote_code"):
        assert len({json.dumps(one.get(key)) for one in args.values()}) == 1, key
    for key in ("dtype", "max_model_len", "limit_mm_per_prompt"):
        assert args["Processor"][key]
    served = settings["Processor"].config.served_model_name
    assert served == ("tiny-llava" if model.startswith("models/tiny/") else model)


def test_pictures_may_come_by_http_and_as_many_as_the_model_is_told(settings: dict[str, ServiceSettings]) -> None:
    frontend, encoder = settings["Frontend"].config.media, settings["EncodeWorker"].config.media
    assert frontend == encoder
    assert frontend.allow_http
    assert not frontend.allow_private
    assert frontend.max_images == settings["Processor"].config.engine_args["limit_mm_per_prompt"]["image"]


TYPOS = [
    ("\nDecodeWorker:", "\nDecodeWorkr:", "did you mean DecodeWorker?"),
    ("\n  max-model-len: ", "\n  max-model-length: 1\n  max-model-len: ", "no service takes max-model-length"),
    ("common-configs: [media]", "common-configs: [medai]", "did you mean media?"),
    ("\nEncodeWorker:\n", "\nEncodeWorker:\n  max-bach: 3\n", "did you mean max-batch?"),
    ("\nDecodeWorker:\n", "\nDecodeWorker:\n  enforce-eagre: true\n", "did you mean enforce-eager?"),
    ("\nFrontend:\n", "\nFrontend:\n  ServiceArgs: {workres: 2}\n", "did you mean workers?"),
    ("allow-http: true", "alow-http: true", "did you mean allow-http?"),
]


@pytest.mark.parametrize(("right", "wrong", "hint"), TYPOS)
def test_a_typo_is_named_with_file_line_and_the_nearest_name(
    name: str, right: str, wrong: str, hint: str, tmp_path: Path
) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert right in text
    typed = text.replace(right, wrong, 1)
    file = tmp_path / "typed.yaml"
    file.write_text(typed)
    lines = zip(text.splitlines(), typed.splitlines(), strict=False)
    line = next(number for number, (old, new) in enumerate(lines, 1) if old != new)
    with pytest.raises(ConfigError) as refused:
        settle(file, graph_of(name))
    assert str(refused.value).startswith(f"{file}:{line}: ")
    assert hint in str(refused.value)


def as_command_line(args: dict[str, Any]) -> list[str]:
    """What a person would give to ``vllm serve`` for these values."""
    words = []
    for key, value in args.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def test_the_engine_takes_the_arguments_as_its_own_command_line_does(settings: dict[str, ServiceSettings]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    for service, args in engine_args(settings).items():
        taken = AsyncEngineArgs(**args)
        parsed = AsyncEngineArgs.from_cli_args(parser.parse_args(as_command_line(args)))
        for key in args:
            assert getattr(taken, key) == getattr(parsed, key), (service, key)


def test_prefill_and_decode_agree_on_the_kv_cache(settings: dict[str, ServiceSettings]) -> None:
    if "PrefillWorker" not in settings:
        assert "kv_transfer_config" not in settings["DecodeWorker"].config.engine_args
        return
    prefill, decode = settings["PrefillWorker"].config.engine_args, settings["DecodeWorker"].config.engine_args
    for key in ("block_size", "tensor_parallel_size", "dtype", "max_model_len", "kv_cache_dtype"):
        assert prefill.get(key) == decode.get(key), key


def test_workers_get_the_gpus_that_their_engines_span(hub: dict[str, ServiceSettings]) -> None:
    for service in ("PrefillWorker", "DecodeWorker"):
        if service in hub:
            assert hub[service].resources["gpu"] == hub[service].config.engine_args.get("tensor_parallel_size", 1)
    assert hub["EncodeWorker"].resources["gpu"] == (1 if family(hub).hand_off == "embedding" else 0)
    assert "gpu" not in hub["Frontend"].resources
    assert "gpu" not in hub["Processor"].resources


def test_arenas_and_prompts_have_room_for_all_pictures(hub: dict[str, ServiceSettings]) -> None:
    checkpoint = checkpoint_of(hub)
    args = hub["Processor"].config.engine_args
    pictures = args["limit_mm_per_prompt"]["image"]
    if family(hub).hand_off == "embedding":
        nbytes = checkpoint.tokens * checkpoint.width * 2
    else:
        nbytes = hub["EncodeWorker"].config.media.max_pixels * 3
    assert pictures * checkpoint.tokens < args["max_model_len"]
    assert takes_pictures(hub).config.arena_bytes >= 3 * pictures * nbytes
    assert hub["EncodeWorker"].config.arena_bytes >= takes_pictures(hub).config.arena_bytes


def test_qwens_pictures_are_as_small_as_its_arenas_suppose(hub: dict[str, ServiceSettings]) -> None:
    checkpoint = checkpoint_of(hub)
    bounds = hub["EncodeWorker"].config.engine_args.get("mm_processor_kwargs", {})
    if checkpoint.model_type != "qwen2_5_vl":
        assert "max_pixels" not in bounds
        return
    assert bounds["max_pixels"] == checkpoint.tokens * 28 * 28
    assert bounds["min_pixels"] < bounds["max_pixels"]


def test_architectures_are_those_of_transformers_and_vllm(hub: dict[str, ServiceSettings]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from vllm import ModelRegistry

    checkpoint = checkpoint_of(hub)
    assert checkpoint.architecture in ModelRegistry.get_supported_archs()
    # Code from the hub runs only where transformers has none, and nowhere else.
    assert checkpoint.remote == (checkpoint.model_type not in CONFIG_MAPPING_NAMES)
    for args in engine_args(hub).values():
        assert args.get("trust_remote_code", False) == checkpoint.remote
    if not checkpoint.remote:
        assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[checkpoint.model_type] == checkpoint.architecture


def test_another_model_is_an_override() -> None:
    """What the tiny files are told to serve another toy checkpoint."""
    document = Document()
    document.read(ROOT / "configs" / "tiny-disagg.yaml")
    document.override("Common", "model", "/elsewhere/qwen")
    document.override("Common", "served-model-name", "tiny-qwen")
    settings = resolve(load_graph("graphs.disagg:Frontend", str(ROOT)), document)
    assert {one["model"] for one in engine_args(settings).values()} == {"/elsewhere/qwen"}
    assert settings["Processor"].config.served_model_name == "tiny-qwen"


def test_every_key_that_a_file_sets_is_read(settings: dict[str, ServiceSettings]) -> None:
    """A field that a configuration may have and no service looks at would be an unknown key with better manners."""
    sources = [path for folder in ("components", "dynamo_epd") for path in (ROOT / folder).rglob("*.py")]
    code = "".join(path.read_text() for path in sources)

    def unread(config: Any, given: dict[str, Any]) -> Iterator[str]:
        fields = {field.name for field in dataclasses.fields(config)}
        for key, value in given.items():
            name = key.replace("-", "_")
            if name not in fields:  # an engine argument: vLLM's own parser is asked in another test
                continue
            if not re.search(rf"\.{name}\b", code):
                yield key
            if dataclasses.is_dataclass(below := getattr(config, name)) and isinstance(value, dict):
                yield from unread(below, value)

    for one in settings.values():
        if one.config is not None:
            assert list(unread(one.config, one.values)) == [], one.name


def test_sizes_and_qualities_are_such_as_the_image_worker_takes(painting: dict[str, ServiceSettings]) -> None:
    config = painting["ImageWorker"].config
    assert "default" in config.sizes
    for size in config.sizes.values():
        width, height = map(int, size.split("x"))
        assert width * height <= config.max_pixels
        if config.model in PAINTERS:
            side = PAINTERS[config.model].side
            assert width % side == height % side == 0, size
    assert {"low", "medium", "high"} <= set(config.qualities)
    assert 0 < config.qualities["low"] < config.qualities["medium"] < config.qualities["high"] <= config.max_steps
    assert -1 <= painting["Processor"].config.validation.threshold <= 1


def test_pictures_may_be_wide_and_tall(wide: dict[str, ServiceSettings]) -> None:
    sizes = wide["ImageWorker"].config.sizes
    assert set(sizes) >= {"square", "landscape", "portrait"}
    for one, other in (("landscape", "portrait"), ("wide", "tall")):
        assert sizes[one].split("x") == sizes[other].split("x")[::-1]
    assert sizes["default"] == sizes["square"]


def test_the_embed_worker_has_the_image_models_own_t5(wide: dict[str, ServiceSettings]) -> None:
    image, embed = wide["ImageWorker"].config, wide["EmbedWorker"].config
    painter = PAINTERS[image.model]
    assert embed.model in painter.conditioned_by
    assert embed.dtype == image.dtype == "bfloat16"
    assert embed.max_tokens >= painter.tokens
    assert embed.batch_tokens % painter.tokens == 0


def test_the_image_pipeline_takes_what_it_is_told(wide: dict[str, ServiceSettings]) -> None:
    import diffusers

    config = wide["ImageWorker"].config
    painter = PAINTERS[config.model]
    takes = inspect.signature(getattr(diffusers, painter.pipeline).__call__).parameters
    assert {"guidance_scale", "callback_on_step_end"} <= takes.keys()
    assert takes["max_sequence_length"].default == painter.tokens
    assert takes["num_inference_steps"].default == config.num_inference_steps == config.qualities["medium"]


def test_arenas_have_room_for_pictures_and_states(wide: dict[str, ServiceSettings]) -> None:
    image, embed = wide["ImageWorker"].config, wide["EmbedWorker"].config
    painter = PAINTERS[image.model]
    states = painter.tokens * painter.width * 2
    picture = image.max_pixels * 3
    assert image.arena_bytes >= image.max_waiting * 2 * picture + 2 * states
    assert embed.arena_bytes >= embed.batch_tokens // painter.tokens * states
    assert wide["EncodeWorker"].config.media.max_pixels >= image.max_pixels


def test_image_and_embed_worker_share_a_card_and_the_others_have_theirs(wide: dict[str, ServiceSettings]) -> None:
    running = {name: one for name, one in wide.items() if one.runs}
    wanted = round(sum(float(one.resources.get("gpu") or 0) * one.workers for one in running.values()))
    devices = [str(index) for index in range(wanted)]
    shares = gpus_for(running, devices)
    image, embed = shares.pop("ImageWorker-0"), shares.pop("EmbedWorker-0")
    assert image.devices == embed.devices and image.fraction + embed.fraction == 1
    owned = [device for share in shares.values() for device in share.devices]
    assert sorted([*owned, *image.devices]) == devices, "no card is left over, and none is given twice"
    with pytest.raises(TooFewGpus, match=f"asks for {wanted}, visible: {wanted - 1}"):
        gpus_for(running, devices[:-1])


def test_a_dry_run_shows_what_would_be_served(cova: str, wide: dict[str, ServiceSettings]) -> None:
    command = [sys.executable, "-m", "dynamo_epd.sdk.cli", "serve", graph_of(cova)]
    done = subprocess.run(
        [*command, "-f", f"configs/{cova}.yaml", "--ImageWorker.ServiceArgs.workers=2", "--dry-run"],
        cwd=ROOT,
        env=clean_environment() | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown, _ = json.JSONDecoder().raw_decode(done.stdout)
    assert shown["services"]["ImageWorker"]["model"] == wide["ImageWorker"].config.model
    assert shown["services"]["ImageWorker"]["sizes"]["landscape"] == "1216x832"
    gpus = {worker: share["CUDA_VISIBLE_DEVICES"] for worker, share in shown["gpus"].items()}
    assert gpus["ImageWorker-0"] != gpus["ImageWorker-1"], "three quarters of a card leave no room for another"
    assert shown["gpus"]["EmbedWorker-0"]["DYNAMO_GPU_FRACTION"] == "0.25"


COVA_TYPOS = [
    ("\nImageWorker:\n", "\nImageWorker:\n  size: {}\n", "did you mean sizes?"),
    ("\nImageWorker:\n", "\nImageWorker:\n  guidance: 3\n", "did you mean guidance-scale?"),
    ("\nEmbedWorker:\n", "\nEmbedWorker:\n  max-token: 3\n", "did you mean max-tokens?"),
    ("    threshold: ", "    treshold: ", "did you mean threshold?"),
]


@pytest.mark.parametrize(("right", "wrong", "hint"), COVA_TYPOS)
def test_a_typo_in_a_section_of_content_validation_is_named(
    cova: str, right: str, wrong: str, hint: str, tmp_path: Path
) -> None:
    text = (ROOT / "configs" / f"{cova}.yaml").read_text()
    assert right in text
    file = tmp_path / "typed.yaml"
    file.write_text(text.replace(right, wrong, 1))
    with pytest.raises(ConfigError) as refused:
        settle(file, graph_of(cova))
    assert re.match(rf"{re.escape(str(file))}:\d+: ", str(refused.value))
    assert hint in str(refused.value)
