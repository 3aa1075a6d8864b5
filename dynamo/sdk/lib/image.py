# SPDX-License-Identifier: Apache-2.0
"""Old place of these names."""

from dynamo_epd.sdk import DYNAMO_IMAGE

__all__ = ["DYNAMO_IMAGE"]
