# SPDX-License-Identifier: Apache-2.0
"""The frontend with embed workers and nothing else."""

from components.embed_worker import EmbedWorker
from components.frontend import Frontend

Frontend.link(EmbedWorker)  # type: ignore[attr-defined]
