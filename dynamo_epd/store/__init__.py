# SPDX-License-Identifier: Apache-2.0
"""Pictures that were made, kept for a while in a directory or in S3.

`backend` is the only importer of obstore, which loads when a `Store` is first used.
"""

from dynamo_epd.store.config import StoreConfig
from dynamo_epd.store.store import Store
from dynamo_epd.store.stored import Stored, new_id

__all__ = ["Store", "StoreConfig", "Stored", "new_id"]
