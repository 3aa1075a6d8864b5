# SPDX-License-Identifier: Apache-2.0
"""The vision tower and projector of a checkpoint, run by vLLM's own model class.

vLLM's ``mm_encoder_only`` mode builds the same module that a whole engine would run on the pixels, without its language
model, so the embeddings are those of a plain ``vllm serve`` for every family that vLLM knows, and one code path serves
them all. There is no engine, no scheduler and no KV cache here: `Encoder` is two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynamo_epd.families import family_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

CHANNELS = 3


def load_encoder(engine_args: dict[str, Any]) -> Encoder | PixelEncoder:
    """The encoder that the checkpoint's family hands off with (seconds to minutes). Raises ValueError for no family."""
    from vllm.engine.arg_utils import EngineArgs

    model_config = EngineArgs(**engine_args).create_model_config()
    family = family_of(model_config.architectures)
    return PixelEncoder() if family.hand_off == "pixels" else Encoder(engine_args)


class Encoder:
    """Loads at construction (seconds to minutes); afterwards `process` and `embed` may run in two different threads.

    Args:
        engine_args: vLLM engine arguments by name (``model``, ``dtype``, ``mm_processor_kwargs``, …). Those that only
            concern a language model are accepted and have no effect, so that one ``Common`` section serves all stages.
    """

    def __init__(self, engine_args: dict[str, Any]):
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model
        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.platforms import current_platform
        from vllm.utils.torch_utils import set_default_torch_dtype

        own = {
            "mm_encoder_only": True,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            # A tower fits one device; more encode workers make the stage faster.
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
        }
        config = EngineArgs(**{**engine_args, **own}).create_engine_config()
        self._config = config
        self.device = current_platform.device_type
        with set_current_vllm_config(config):
            _join_world_of_one()
            self._processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
            with set_default_torch_dtype(config.model_config.dtype):
                self._model = get_model(vllm_config=config)
        self._patch_numbers = _numbers_of_a_patch(config.model_config.hf_config)
        self._metadata_fields = sorted(self._processor.info.get_data_parser().placeholder_metadata_fields("image"))

    def process(self, image: Image.Image) -> Any:
        """Resizes, crops and normalises one RGB image: CPU work, one item for `embed`.

        Raises:
            ValueError: the model's image processor refuses the image (an extreme aspect ratio, say).
        """
        from vllm.multimodal.processing import ProcessorInputs, TimingContext

        items = self._processor.info.parse_mm_data({"image": [image]})
        try:
            result = self._processor._apply_hf_processor(
                ProcessorInputs(prompt=[], mm_data_items=items, mm_uuid_items={"image": [""]}),
                TimingContext(enabled=False),
            )
        except ValueError as error:
            # vLLM says this of whatever the image processor raised, with its input: a client may see neither.
            raise (error.__cause__ or error) from None
        return result.kwargs["image"][0]

    def embed(self, items: Sequence[Any]) -> list[torch.Tensor]:
        """One forward over all ``items`` that can share a batch (equal fields; towers of fixed size stack them).

        Returns:
            One tensor an item, shape (tokens, width), in the model's dtype, on `device`. The width is that of the
            language model's input, for Qwen3-VL times one more than it has DeepStack levels.
        """
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import set_forward_context
        from vllm.multimodal.utils import group_and_batch_mm_items

        outputs: list[torch.Tensor] = []
        with (
            torch.inference_mode(),
            set_current_vllm_config(self._config),
            set_forward_context(None, self._config),
        ):
            for _, batch in group_and_batch_mm_items(items, device=torch.device(self.device)):
                outputs.extend(self._model.embed_multimodal(**batch))
        return outputs

    def patches(self, item: Any) -> int:
        """How many the tower cuts ``item`` into, all of its tiles together: a forward costs what these cost."""
        values = [item[name].data for name in item if name.startswith("pixel_values")]
        numbers = sum(part.numel() for value in values for part in (value if isinstance(value, list) else [value]))
        return max(1, int(numbers) // self._patch_numbers)

    def metadata(self, item: Any) -> dict[str, list[int]]:
        """What the language model must know beside the embedding, by vLLM's field name.

        Empty for families whose embedding says it all (LLaVA); ``{"image_grid_thw": [t, h, w]}`` for Qwen-VL.
        """
        return {name: item[name].data.flatten().tolist() for name in self._metadata_fields if name in item}


class PixelEncoder:
    """For families whose tower runs where the prompt is prefilled: the hand-off is the decoded picture itself."""

    def process(self, image: Image.Image) -> torch.Tensor:
        """(height, width, 3) uint8."""
        import numpy
        import torch

        return torch.from_numpy(numpy.array(image))

    def embed(self, items: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return items

    def patches(self, item: torch.Tensor) -> int:
        return 1

    def metadata(self, item: torch.Tensor) -> dict[str, list[int]]:
        return {}


def _numbers_of_a_patch(config: Any) -> int:
    """Of the checkpoint's tower; of ViT-L/14's where it does not say. A patch may span frames, as Qwen-VL's does."""
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "patch_size", None) or 14
    if isinstance(side, (list, tuple)):
        side = side[0]
    return int(CHANNELS * side**2 * (getattr(vision, "temporal_patch_size", None) or 1))


def _join_world_of_one() -> None:
    """vLLM's layers ask for tensor-parallel groups even where there is one process. Encoders in it share them."""
    import torch
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.platforms import current_platform

    if model_parallel_is_initialized():
        return
    # A store of its own: vLLM's would listen on every address of the machine, for anybody.
    backend = current_platform.dist_backend
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    init_distributed_environment(world_size=1, rank=0, local_rank=0, backend=backend)
    initialize_model_parallel(1, 1)
