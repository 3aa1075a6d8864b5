# SPDX-License-Identifier: Apache-2.0
"""The page at ``/ui``: a client of the graph's own HTTP API, made with Gradio, which loads when the service starts."""
