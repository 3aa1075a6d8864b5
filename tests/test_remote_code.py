# SPDX-License-Identifier: Apache-2.0
"""Code that comes with a checkpoint is not run unless the operator asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dynamo_epd.engine.encoder import load_encoder
from dynamo_epd.engine.front import OpenAIFront

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({marker!r}).touch()

class Foreign(PretrainedConfig):
    model_type = "foreign"
"""


@pytest.mark.parametrize("stage", [load_encoder, lambda given: OpenAIFront(given, ["m"])], ids=["encode", "processor"])
def test_code_of_a_checkpoint_is_not_run(tmp_path: Path, stage: Callable[[dict[str, Any]], Any]) -> None:
    ran = tmp_path / "ran"
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "configuration_foreign.py").write_text(CODE.format(marker=str(ran)))
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "configuration_foreign.Foreign"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        stage({"model": str(checkpoint)})
    assert not ran.exists()
    with suppress(Exception):  # it is no model; what counts is that it was read now
        stage({"model": str(checkpoint), "trust_remote_code": True})
    assert ran.exists()
