# SPDX-License-Identifier: Apache-2.0
"""Nobody imports this."""
