# SPDX-License-Identifier: Apache-2.0
"""A graph beyond this machine: built, turned into an image, described to Kubernetes, and looked after there."""


class DeploymentError(Exception):
    """Something failed on the way: no cluster, no rights, a name that is taken. The message is one line."""
