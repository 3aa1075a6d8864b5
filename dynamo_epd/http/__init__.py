# SPDX-License-Identifier: Apache-2.0
"""The HTTP edge: bounds on a request, checks of an OpenAI body, the error body of every reply."""
