# SPDX-License-Identifier: Apache-2.0
"""`ServiceConfig`, as graphs written for Dynamo 0.2 and 0.3 import it."""

from dynamo_epd.sdk.old_sdk import ServiceConfig

__all__ = ["ServiceConfig"]
