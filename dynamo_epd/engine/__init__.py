# SPDX-License-Identifier: Apache-2.0
"""The only importer of vLLM. Nothing is imported here: each module loads vLLM when a service starts."""
