# SPDX-License-Identifier: Apache-2.0
"""`Generator` with pipelines of each class, on random weights, against plain diffusers. No graph, no network."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dynamo_epd.diffusion.generator import Generator, Made, Stopped, Wanted, to_bytes
from dynamo_epd.diffusion.text_encoder import Conditioning, Row
from dynamo_epd.errors import InvalidRequest
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.text.t5 import TextEncoder
from tests.serving import untrained
from tests.toys.running import ROOT

FAMILIES = ("pixart", "flux", "flux_schnell", "sd3", "sdxl")
T5_OF = {
    "pixart": "text_encoder",
    "flux": "text_encoder_2",
    "flux_schnell": "text_encoder_2",
    "sd3": "text_encoder_3",
}
STAR = "a large red star on a blue background"
RING = "a small green ring on a yellow background"
WANTED = Wanted(STAR, seed=1, width=64, height=64, steps=4)

generator = functools.cache(lambda family, **options: Generator(str(untrained(family)), **options))


def make(one: Generator, wanted: Wanted, on_step: Any = lambda *_: None) -> Made:
    return one.generate(wanted, on_step, threading.Event())


@functools.cache
def plain(family: str) -> Any:
    return loaded(untrained(family))


def loaded(directory: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_plain(pixels: np.ndarray, family: str, wanted: Wanted) -> None:
    """They are those of the pipeline's own call. Of PixArt's, which attends to no padding here, sums are in another
    order: a value may then be rounded the other way where it lies within a hundredth of a level of the middle.
    """
    image = drawn(plain(family), wanted)
    if family == "pixart":
        assert np.abs(pixels - 255 * image.clip(0, 1)).max() < 0.51
    else:
        np.testing.assert_array_equal(pixels, to_bytes(image))


def expected(pipeline: Any, wanted: Wanted) -> np.ndarray:
    """What plain diffusers makes of it: uint8 (height, width, 3)."""
    return to_bytes(drawn(pipeline, wanted))


def drawn(pipeline: Any, wanted: Wanted) -> np.ndarray:
    """The same before it is rounded: float32 in 0 to 1."""
    arguments: dict[str, Any] = {
        "num_inference_steps": wanted.steps,
        "guidance_scale": wanted.guidance_scale,
        "negative_prompt": wanted.negative_prompt,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if type(pipeline).__name__.startswith("PixArt"):
        arguments |= {"use_resolution_binning": False, "clean_caption": False}
    seed = torch.Generator().manual_seed(wanted.seed)
    size = {"width": wanted.width, "height": wanted.height}
    with torch.inference_mode():
        image = pipeline(wanted.prompt, **size, generator=seed, output_type="np", **arguments).images[0]
    return np.asarray(image)


def changed(family: str, directory: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a pipeline that something is done to."""
    shutil.copytree(untrained(family), directory)
    change(directory)
    return directory


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The same pixels as the pipeline's own call


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wanted", [WANTED, Wanted(RING, 2, 96, 40, steps=1), Wanted("", 3, 64, 64, steps=2)])
def test_pixels_are_those_of_plain_diffusers(family: str, wanted: Wanted) -> None:
    made = make(generator(family), wanted)
    assert (made.pixels.shape, made.pixels.dtype) == ((wanted.height, wanted.width, 3), np.uint8)
    assert_plain(made.pixels, family, wanted)
    assert made.prompt_vector is None


@pytest.mark.parametrize("family", ["pixart", "sd3", "sdxl"])
def test_guidance_and_negative_prompts_are_passed_on(family: str) -> None:
    wanted = replace(WANTED, guidance_scale=3.0, negative_prompt=RING)
    made = make(generator(family), wanted).pixels
    assert_plain(made, family, wanted)
    for other in (replace(wanted, guidance_scale=6.0), replace(wanted, negative_prompt=STAR), WANTED):
        assert not np.array_equal(make(generator(family), other).pixels, made)


def test_a_distilled_model_takes_its_embedded_guidance() -> None:
    wanted = replace(WANTED, guidance_scale=9.0)
    made = make(generator("flux"), wanted).pixels
    np.testing.assert_array_equal(made, expected(plain("flux"), wanted))
    assert not np.array_equal(made, make(generator("flux"), WANTED).pixels)


def test_steps_that_nobody_names_are_the_pipelines() -> None:
    told: list[tuple[int, int]] = []
    make(generator("flux"), replace(WANTED, steps=None), lambda done, total, _: told.append((done, total)))
    assert generator("flux").steps == 28
    assert told == [(done, 28) for done in range(1, 29)]


def test_bfloat16_is_near() -> None:
    rough = make(generator("flux", dtype="bfloat16"), WANTED).pixels.astype(int)
    assert 0 < np.abs(rough - expected(plain("flux"), WANTED)).mean() < 3


def test_no_step_attends_to_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = generator("pixart")._pipeline.transformer
    forward, seen = denoiser.forward, []

    def told(*given: Any, **named: Any) -> Any:
        seen.append(named["encoder_hidden_states"].shape[1])
        return forward(*given, **named)

    monkeypatch.setattr(denoiser, "forward", told)
    made = make(generator("pixart"), replace(WANTED, guidance_scale=1.0))
    assert seen == [made.prompt_tokens] * 4


def test_t5_encodes_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = generator("pixart")._pipeline.text_encoder.encoder
    forward, seen = stack.forward, []

    def told(*given: Any, **named: Any) -> Any:
        seen.append((tuple(named["input_ids"].shape), tuple(named["attention_mask"].shape)))
        return forward(*given, **named)

    monkeypatch.setattr(stack, "forward", told)
    one, another = WANTED, replace(WANTED, prompt="what nobody has asked for", negative_prompt="a star")
    for wanted in (one, another, replace(another, seed=6), one):
        assert_plain(make(generator("pixart"), wanted).pixels, "pixart", wanted)
    tokens = [len(generator("pixart")._pipeline.tokenizer(text).input_ids) for text in (another.prompt, "a star")]
    assert seen[-2:] == [((1, count),) * 2 for count in tokens]
    assert len(seen) <= 4, "no text is encoded again"


# T5 elsewhere


def asking(family: str, asked: list[Row]) -> Callable[[Row], Conditioning]:
    """The pipeline's very T5, as an embed worker runs it."""
    encoder = TextEncoder(str(untrained(family)))

    def ask(row: Row) -> Conditioning:
        asked.append(row)
        real = list(row.ids[: row.real])
        rows = encoder.encode([real] if row.masked else [list(row.ids), real])
        return Conditioning(rows[0].states, rows[-1].vector.numpy().tobytes())

    return ask


@pytest.mark.parametrize("family", sorted(T5_OF))
def test_pixels_are_the_same_with_t5_elsewhere(family: str) -> None:
    asked: list[Row] = []
    one = Generator(str(untrained(family)), ask=asking(family, asked))
    own = generator(family).parameters
    assert one.parameters == own | {T5_OF[family]: 0}
    assert own[T5_OF[family]] > 0
    for wanted in (WANTED, replace(WANTED, prompt=RING, seed=5)):
        made = make(one, wanted)
        # A row of a batch is rounded in another way than a row alone.
        assert np.abs(made.pixels.astype(int) - expected(plain(family), wanted)).max() <= 1
        vector = np.frombuffer(made.prompt_vector or b"", "<f4")
        text = TextEncoder(str(untrained(family)))
        np.testing.assert_allclose(vector, text.encode([text.tokenize(wanted.prompt, "")])[0].vector, atol=1e-5)
    guided = family in ("pixart", "sd3")
    assert len(asked) == 2 + guided, "each prompt is asked for once, and what guides away from it once for all"


def test_what_t5_says_is_seen() -> None:
    def nothing(row: Row) -> Conditioning:
        return Conditioning(torch.zeros(len(row.ids), 32), b"")

    blank = make(Generator(str(untrained("flux")), ask=nothing), WANTED).pixels
    assert np.abs(blank.astype(int) - expected(plain("flux"), WANTED)).mean() > 1


def test_a_pipeline_without_t5_asks_for_nothing() -> None:
    def ask(row: Row) -> Conditioning:
        raise AssertionError("nothing is to be asked")

    made = make(Generator(str(untrained("sdxl")), ask=ask), WANTED)
    np.testing.assert_array_equal(made.pixels, expected(plain("sdxl"), WANTED))
    assert made.prompt_vector is None


# Alone and among others


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_is_a_picture_whatever_ran_before(family: str) -> None:
    one = generator(family)
    alone = make(one, WANTED).pixels
    make(one, Wanted(RING, 9, 96, 40, steps=7))
    np.testing.assert_array_equal(make(one, WANTED).pixels, alone)
    assert not np.array_equal(make(one, replace(WANTED, seed=2)).pixels, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_at_once_get_the_pictures_that_they_get_alone(family: str) -> None:
    one = generator(family)
    crowd = [Wanted((STAR, RING)[index % 2], index, 64, 32 + 32 * (index % 2), steps=1 + index) for index in range(6)]
    alone = [make(one, wanted).pixels for wanted in crowd]
    with ThreadPoolExecutor(len(crowd)) as pool:
        together = list(pool.map(lambda wanted: make(one, wanted).pixels, crowd))
    for picture, same in zip(together, alone, strict=True):
        np.testing.assert_array_equal(picture, same)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_whose_steps_are_taken_together_are_those_made_alone(family: str) -> None:
    """Up to rounding: a row of a batch is rounded in another way than a row alone."""
    sizes: list[int] = []
    one = Generator(str(untrained(family)), max_batch=4, on_batch=sizes.append)
    crowd = [Wanted((STAR, RING)[index % 2], index, 64, 64, steps=12 + index) for index in range(6)]
    crowd.append(Wanted(STAR, 7, 96, 40, steps=12))  # of another size: beside them, but in no call of theirs
    with ThreadPoolExecutor(len(crowd)) as pool:
        together = list(pool.map(lambda wanted: make(one, wanted), crowd))
    assert 1 < max(sizes) <= 4
    for wanted, made in zip(crowd, together, strict=True):
        difference = np.abs(made.pixels.astype(int) - expected(plain(family), wanted))
        assert difference.max() <= 1, f"{wanted}: {difference.max()} levels"


def test_with_t5_elsewhere_each_of_many_pictures_has_the_vector_of_its_prompt() -> None:
    one = Generator(str(untrained("pixart")), ask=asking("pixart", []), max_batch=4)
    prompts = [f"{STAR} {index}" for index in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        made = list(pool.map(lambda prompt: make(one, replace(WANTED, prompt=prompt)), prompts))
    text = TextEncoder(str(untrained("pixart")))
    for prompt, picture in zip(prompts, made, strict=True):
        vector = np.frombuffer(picture.prompt_vector or b"", "<f4")
        np.testing.assert_allclose(vector, text.encode([text.tokenize(prompt, "")])[0].vector, atol=1e-5)


# Progress


@pytest.mark.parametrize("family", FAMILIES)
def test_previews_near_the_picture_and_change_nothing(family: str) -> None:
    shown: list[np.ndarray] = []
    wanted = replace(WANTED, width=96, height=40, steps=3)
    made = make(generator(family), wanted, lambda done, total, preview: shown.append(preview()))
    assert [one.shape for one in shown] == [(40, 96, 3)] * 3
    assert np.abs(shown[-1].astype(int) - made.pixels).max() <= 1, "the last one is the picture"
    assert not np.array_equal(shown[0], made.pixels)
    assert_plain(made.pixels, family, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_that_nobody_wants_ends_at_the_next_step(family: str) -> None:
    stop, told = threading.Event(), []

    def on_step(done: int, total: int, preview: Any) -> None:
        told.append((done, total))
        if done == 2:
            stop.set()

    with pytest.raises(Stopped):
        generator(family).generate(replace(WANTED, steps=20), on_step, stop)
    assert told == [(1, 20), (2, 20)]
    assert_plain(make(generator(family), WANTED).pixels, family, WANTED)


def test_a_picture_begins_when_its_turn_comes_unless_nobody_wants_it_by_then() -> None:
    one, order = generator("sdxl"), list[str]()
    left = threading.Event()
    others: list[Future[Made]] = []
    with ThreadPoolExecutor(2) as pool:

        def on_step(done: int, total: int, _: Any) -> None:
            if done == 1:
                for name, stop in (("second", threading.Event()), ("third", left)):
                    begins = functools.partial(order.append, name)
                    others.append(pool.submit(one.generate, WANTED, lambda *_: None, stop, begins))
                until = time.monotonic() + 20
                while len(one._meeting._line) < 2 and time.monotonic() < until:
                    time.sleep(0.01)
                left.set()
            order.append(f"step {done}")

        one.generate(replace(WANTED, steps=2), on_step, threading.Event(), functools.partial(order.append, "first"))
        assert others[0].result(60).pixels.shape == (64, 64, 3)
        assert isinstance(others[1].exception(60), Stopped)
    assert order == ["first", "step 1", "step 2", "second"]


def test_a_scheduler_of_second_order_tells_of_each_step_once(tmp_path: Path) -> None:
    def heun(directory: Path) -> None:
        config = plain("sdxl").scheduler.config
        HeunDiscreteScheduler.from_config(config).save_pretrained(directory / "scheduler")
        edit_json(directory / "model_index.json", scheduler=["diffusers", "HeunDiscreteScheduler"])

    directory = changed("sdxl", tmp_path / "heun", heun)
    told: list[int] = []
    made = make(Generator(str(directory)), replace(WANTED, steps=5), lambda done, total, _: told.append(done))
    assert told == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(made.pixels, expected(loaded(directory), replace(WANTED, steps=5)))


def test_counts_of_tokens() -> None:
    counted = {family: make(generator(family), replace(WANTED, steps=1)).image_tokens for family in FAMILIES}
    assert counted == {"pixart": 64, "flux": 64, "flux_schnell": 64, "sd3": 64, "sdxl": 256}
    assert make(generator("flux"), replace(WANTED, steps=1)).prompt_tokens == len(
        plain("flux").tokenizer_2(STAR).input_ids
    )


# What cannot be honoured is refused by name


@pytest.mark.parametrize(
    ("family", "fields", "param"),
    [
        ("flux", {"negative_prompt": RING}, "negative_prompt"),
        ("flux_schnell", {"negative_prompt": RING}, "negative_prompt"),
        ("flux_schnell", {"guidance_scale": 2.0}, "guidance_scale"),
        ("sdxl", {"guidance_scale": 1.0, "negative_prompt": RING}, "negative_prompt"),
        ("sd3", {"guidance_scale": 0.0, "negative_prompt": RING}, "negative_prompt"),
        *((family, {"lora": "none"}, "lora") for family in FAMILIES),
        *((family, {"width": 61, "height": 67}, "size") for family in FAMILIES),
        *((family, {"width": 68}, "size") for family in FAMILIES if family != "sdxl"),
        ("sdxl", {"width": 66}, "size"),
        ("sd3", {"width": 256}, "size"),
        ("flux", {"prompt": "star " * 600}, "prompt"),
        ("pixart", {"prompt": "star " * 400}, "prompt"),
        ("sd3", {"negative_prompt": "star " * 400}, "negative_prompt"),
        ("sdxl", {"prompt": "star " * 40}, "prompt"),
    ],
)
def test_refusals(family: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make(generator(family), replace(WANTED, **fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert_plain(make(generator(family), WANTED).pixels, family, WANTED)


@pytest.mark.parametrize("fields", [{"lora": "none"}, {"prompt": "star " * 600}], ids=["an adapter", "a prompt"])
def test_a_refusal_waits_for_nobody(fields: dict[str, Any]) -> None:
    """Neither for a turn nor for those with other adapters: it is there while another picture has its turn."""
    one = Generator(str(untrained("flux")), max_batch=4)
    wanted = replace(WANTED, **fields)
    refused: list[BaseException | None] = []
    with ThreadPoolExecutor(2) as pool:

        def on_step(done: int, total: int, _: Any) -> None:
            if done == 1:
                refused.extend(pool.submit(ask, wanted).exception(20) for ask in (one.check, lambda it: make(one, it)))

        make(one, WANTED, on_step)
    assert [type(error) for error in refused] == [InvalidRequest] * 2


def test_a_unet_takes_every_size_of_whole_latents() -> None:
    wanted = replace(WANTED, width=72, height=88)
    np.testing.assert_array_equal(make(generator("sdxl"), wanted).pixels, expected(plain("sdxl"), wanted))


def test_a_picture_of_no_numbers_is_not_passed_off_as_one(tmp_path: Path) -> None:
    def spoil(directory: Path) -> None:
        path = directory / "vae/diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["decoder.conv_out.bias"].fill_(float("nan"))
        save_file(tensors, path)

    with pytest.raises(InvalidRequest, match="not finite"):  # no defect: guidance can do that to single pictures
        make(Generator(str(changed("flux", tmp_path / "nan", spoil))), WANTED)


# LoRA adapters


@pytest.fixture(scope="module", params=["flux", "sd3", "sdxl"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A family, and two adapters for it: of the denoiser alone, and of a CLIP too where there is a loader for it."""
    family: str = request.param
    denoiser = "unet" if family == "sdxl" else "transformer"
    found = {}
    for name, parts in (("red", [denoiser]), ("v1.0 blue", [denoiser, "text_encoder"])):
        pipeline = loaded(untrained(family))
        torch.manual_seed(len(name))
        layers = {}
        for part in parts:
            targets = ["q_proj", "v_proj"] if part == "text_encoder" else ["to_q", "to_v"]
            model = getattr(pipeline, part)
            model.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False))
            layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        directory = tmp_path_factory.mktemp("lora")
        type(pipeline).save_lora_weights(directory, **layers)
        found[name] = str(directory)
    return family, found


def test_adapters_by_name_per_request(adapted: tuple[str, dict[str, str]]) -> None:
    family, adapters = adapted
    one = Generator(str(untrained(family)), loras=adapters)
    pictures = {}
    for name, directory in adapters.items():
        pipeline = loaded(untrained(family))
        pipeline.load_lora_weights(directory, use_safetensors=True)
        pictures[name] = expected(pipeline, WANTED)
        np.testing.assert_array_equal(make(one, replace(WANTED, lora=name)).pixels, pictures[name])
    assert_plain(make(one, WANTED).pixels, family, WANTED)
    assert not np.array_equal(pictures["red"], pictures["v1.0 blue"])
    assert not any(np.array_equal(picture, expected(plain(family), WANTED)) for picture in pictures.values())
    with pytest.raises(InvalidRequest, match=r"red, v1\.0 blue"):
        make(one, replace(WANTED, lora="green"))


@pytest.mark.parametrize(("max_batch", "levels"), [(1, 0), (4, 1)], ids=["alone", "sharing steps"])
def test_adapters_do_not_leak_into_neighbours(adapted: tuple[str, dict[str, str]], max_batch: int, levels: int) -> None:
    family, adapters = adapted
    one = Generator(str(untrained(family)), loras=adapters, max_batch=max_batch)
    crowd = [replace(WANTED, seed=index, lora=[None, *adapters][index % 3]) for index in range(9)]
    alone = [make(one, wanted).pixels for wanted in crowd]
    with ThreadPoolExecutor(len(crowd)) as pool:
        together = list(pool.map(lambda wanted: make(one, wanted).pixels, crowd))
    for wanted, picture, same in zip(crowd, together, alone, strict=True):
        assert np.abs(picture.astype(int) - same).max() <= levels
        if wanted.lora is None:
            assert_plain(same, family, wanted)


def test_an_adapter_that_does_not_fit_is_an_error_at_start(adapted: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    family, adapters = adapted
    other = "sdxl" if family != "sdxl" else "sd3"
    for directory in (adapters["red"], str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ConfigError) as caught:
            Generator(str(untrained(other)), loras={"red": directory})
        assert "\n" not in str(caught.value)


def test_a_pipeline_without_a_loader_of_adapters_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no LoRA"):
        Generator(str(untrained("pixart")), loras={"red": str(tmp_path)})


# Switches


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_slicing_is_the_same_picture(family: str, caplog: pytest.LogCaptureFixture) -> None:
    one = Generator(str(untrained(family)), attention_slicing=True, vae_slicing=True)
    assert np.abs(make(one, WANTED).pixels.astype(int) - expected(plain(family), WANTED)).max() <= 1
    warned = "attention-slicing changes nothing" in caplog.text
    assert warned == (family == "flux"), "transformers of diffusers have no slices"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offloading_without_a_gpu_is_said_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    one = Generator(str(untrained("flux")), cpu_offload=True)
    assert "no GPU here" in caplog.text
    np.testing.assert_array_equal(make(one, WANTED).pixels, expected(plain("flux"), WANTED))


@pytest.mark.parametrize("family", sorted(T5_OF))
def test_the_hooks_of_cpu_offload_work_around_a_t5_elsewhere(family: str) -> None:
    """Without a GPU: what moves modules to one moves them to the CPU instead."""
    one = Generator(str(untrained(family)), ask=asking(family, []))
    one._pipeline.enable_model_cpu_offload(device="cpu")
    stop = threading.Event()
    for wanted in (WANTED, replace(WANTED, prompt=RING)):
        made = make(one, wanted, lambda done, total, preview: preview())
        assert np.abs(made.pixels.astype(int) - expected(plain(family), wanted)).max() <= 1
        with pytest.raises(Stopped):
            one.generate(wanted, lambda *_: stop.set(), stop)


START = """
import sys
from dynamo_epd.diffusion.generator import Generator
from dynamo_epd.sdk.config import ConfigError
try:
    Generator(sys.argv[1])
except ConfigError as error:
    print("said:", error)
"""


def started(*arguments: str, **environment: str) -> str:
    """What a start in a process of its own says."""
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


# Models that cannot be loaded


def without_weights(directory: Path) -> None:
    (directory / "vae/diffusion_pytorch_model.safetensors").unlink()


def truncated(directory: Path) -> None:
    os.truncate(directory / "vae/diffusion_pytorch_model.safetensors", 5000)


def pickled(directory: Path) -> None:
    path = directory / "vae/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: (one / "model_index.json").unlink(), "no pipeline of diffusers"),
        (lambda one: (one / "model_index.json").write_text("{"), "cannot be loaded"),
        (lambda one: edit_json(one / "model_index.json", _class_name="NoPipeline"), "NoPipeline"),
        (lambda one: edit_json(one / "model_index.json", _class_name=["pipeline", "Own"]), "Own"),
        (lambda one: edit_json(one / "model_index.json", _class_name="FluxImg2ImgPipeline"), "FluxImg2ImgPipeline"),
        (lambda one: edit_json(one / "model_index.json", _class_name="StableDiffusionXLPipeline"), "cannot be loaded"),
        (lambda one: shutil.rmtree(one / "tokenizer"), "no vocabulary in its 'tokenizer'"),
        (lambda one: (one / "tokenizer_2/tokenizer.json").unlink(), "no vocabulary in its 'tokenizer_2'"),
        (lambda one: edit_json(one / "transformer/config.json", num_layers=5), "cannot be loaded"),
        (without_weights, "cannot be loaded"),
        (truncated, "cannot be loaded"),
        (pickled, "cannot be loaded"),
    ],
)
def test_a_broken_directory_is_an_error_at_start(change: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Generator(str(changed("flux", tmp_path / "broken", change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such", "./no/such", "a/b/c", "", "models/untrained.py"])
def test_a_name_that_can_be_no_model_is_an_error_at_start(name: str) -> None:
    with pytest.raises(ConfigError):
        Generator(name)


def test_a_name_on_the_hub_without_the_hub_is_an_error_in_one_line(tmp_path: Path) -> None:
    said = started("nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert said == (
        "said: model 'nobody/nothing' is no directory here, not in the hub's cache, and the hub cannot be reached\n"
    )
