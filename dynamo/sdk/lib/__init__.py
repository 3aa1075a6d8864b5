# SPDX-License-Identifier: Apache-2.0
"""Old places of the SDK's names."""
