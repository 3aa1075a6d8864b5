# SPDX-License-Identifier: Apache-2.0
"""Old place of these names."""

from dynamo_epd.sdk import async_on_start, dynamo_endpoint

__all__ = ["async_on_start", "dynamo_endpoint"]
