# SPDX-License-Identifier: Apache-2.0
"""How many workers each stage of a graph should have: the decision, how it is fed, and how it is tried on traces."""
