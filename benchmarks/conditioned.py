# SPDX-License-Identifier: Apache-2.0
"""Image workers whose T5 is an embed worker's, and nothing else."""

from components.embed_worker import EmbedWorker
from components.frontend import Frontend
from components.image_worker import ImageWorker

Frontend.link(ImageWorker)  # type: ignore[attr-defined]
ImageWorker.link(EmbedWorker)  # type: ignore[attr-defined]
