# SPDX-License-Identifier: Apache-2.0
"""Image workers that have a T5 each, and nothing else."""

from components.frontend import Frontend
from components.image_worker import ImageWorker

Frontend.link(ImageWorker)  # type: ignore[attr-defined]
