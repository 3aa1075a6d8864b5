# SPDX-License-Identifier: Apache-2.0
"""Where an endpoint is found on the request plane."""

from __future__ import annotations

import re


def endpoint_path(address: tuple[str, str], endpoint: str) -> str:
    """``namespace.component.endpoint`` as the runtime takes it.

    In lower case: runtime 1.6 serves a component under the lower-case slug of its name on NATS, but sends requests to
    the name as it was given, so a capital letter makes every request fail.
    """
    return ".".join(re.sub(r"[^a-z0-9_-]", "_", part.lower()) for part in (*address, endpoint))
