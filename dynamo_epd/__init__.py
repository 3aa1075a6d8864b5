# SPDX-License-Identifier: Apache-2.0
"""The library behind the graph. Importing it imports nothing heavy: torch, vLLM, NIXL load when a service starts."""
