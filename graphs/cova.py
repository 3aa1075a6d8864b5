# SPDX-License-Identifier: Apache-2.0
"""Content validation: the disaggregated chain, an image worker in front of it, and T5 on both ends."""

from components.decode_worker import DecodeWorker
from components.embed_worker import EmbedWorker
from components.encode_worker import EncodeWorker
from components.frontend import Frontend
from components.image_worker import ImageWorker
from components.planner import Planner
from components.prefill_worker import PrefillWorker
from components.processor import Processor

Frontend.link(Planner)
Frontend.link(Processor)
Frontend.link(EmbedWorker)
Frontend.link(ImageWorker)
ImageWorker.link(EmbedWorker)
Processor.link(EncodeWorker)
Processor.link(PrefillWorker)
Processor.link(DecodeWorker)
Processor.link(ImageWorker)
Processor.link(EmbedWorker)
