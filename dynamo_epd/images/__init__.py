# SPDX-License-Identifier: Apache-2.0
"""Pictures that a client named or sent: fetched inside the address rules, decoded inside the size rules."""
