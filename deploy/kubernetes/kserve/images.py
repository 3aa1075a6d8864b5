# SPDX-License-Identifier: Apache-2.0
"""Pictures alone: what of the graph a KServe InferenceService serves."""

from components.embed_worker import EmbedWorker
from components.frontend import Frontend
from components.image_worker import ImageWorker

Frontend.link(EmbedWorker)
Frontend.link(ImageWorker)
ImageWorker.link(EmbedWorker)
