# SPDX-License-Identifier: Apache-2.0
"""Texts as vectors."""
