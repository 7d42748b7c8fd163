"""The versions that a result hangs on, and what makes long measurements stoppable: `sdguard.measuring`."""

from __future__ import annotations

import importlib.metadata

from sdguard.measuring import measured

__all__ = ["measured", "versions"]

PACKAGES = ("sdguard", "torch", "diffusers", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """The versions of the libraries that a result hangs on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}
