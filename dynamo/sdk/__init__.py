# SPDX-License-Identifier: Apache-2.0
"""The SDK under the name that graphs written for Dynamo 0.2 and 0.3 import it by."""

from dynamo_epd.sdk import *  # noqa: F403
from dynamo_epd.sdk import __all__ as __all__
