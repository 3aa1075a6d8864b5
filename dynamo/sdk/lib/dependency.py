# SPDX-License-Identifier: Apache-2.0
"""Old place of these names."""

from dynamo_epd.sdk import depends

__all__ = ["depends"]
