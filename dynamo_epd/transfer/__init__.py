# SPDX-License-Identifier: Apache-2.0
"""Bytes and tensors between processes, over NIXL, from registered memory to registered memory.

The only importer of NIXL; it and torch load when an `Arena` is opened or a tensor asked for, not on import.
"""

from dynamo_epd.transfer.arena import Arena
from dynamo_epd.transfer.handle import Handle
from dynamo_epd.transfer.slots import Entry, Reservation, Slot

__all__ = ["Arena", "Entry", "Handle", "Reservation", "Slot"]
