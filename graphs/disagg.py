# SPDX-License-Identifier: Apache-2.0
"""Disaggregated: encode, prefill and decode each in workers of their own."""

from components.decode_worker import DecodeWorker
from components.encode_worker import EncodeWorker
from components.frontend import Frontend
from components.planner import Planner
from components.prefill_worker import PrefillWorker
from components.processor import Processor

Frontend.link(Planner)
Frontend.link(Processor)
Processor.link(EncodeWorker)
Processor.link(PrefillWorker)
Processor.link(DecodeWorker)
