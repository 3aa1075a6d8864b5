# SPDX-License-Identifier: Apache-2.0
"""Aggregated: encode apart, prefill and decode in one worker."""

from components.decode_worker import DecodeWorker
from components.encode_worker import EncodeWorker
from components.frontend import Frontend
from components.planner import Planner
from components.processor import Processor

Frontend.link(Planner)
Frontend.link(Processor)
Processor.link(EncodeWorker)
Processor.link(DecodeWorker)
