# SPDX-License-Identifier: Apache-2.0
"""Starts ``dynamo.vllm`` with the same arguments, and with a receive buffer that fits beside other arms.

Dynamo's prefill worker writes zeroes to 8 GiB as it starts, into which encode workers then WRITE embeddings, and has no
option for how much. Two arms that do so leave no memory to a third.
"""

from __future__ import annotations

import runpy

RECEIVE_BYTES = 256 * 2**20
"""A picture of any row here has at most 0.5 MiB of embeddings."""

if __name__ == "__main__":
    from dynamo.common.multimodal.embedding_transfer import NixlWriteEmbeddingReceiver

    NixlWriteEmbeddingReceiver.__init__.__defaults__ = (RECEIVE_BYTES,)
    runpy.run_module("dynamo.vllm", run_name="__main__", alter_sys=True)
