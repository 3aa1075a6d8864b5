# SPDX-License-Identifier: Apache-2.0
"""The frontend with image workers that embed workers condition, and nothing else."""

from components.embed_worker import EmbedWorker
from components.frontend import Frontend
from components.image_worker import ImageWorker

Frontend.link(ImageWorker)  # type: ignore[attr-defined]
Frontend.link(EmbedWorker)  # type: ignore[attr-defined]
ImageWorker.link(EmbedWorker)  # type: ignore[attr-defined]
