"""Which versions of SGLang the plug-in was written after."""

from __future__ import annotations

READ = frozenset({"0.5.12", "0.5.16", "0.5.20", "0.5.23"})
"""The scheduler's attributes are no public interface of SGLang, so they were read in each of these versions. The
plug-in was not run inside any of them."""
STRICT_SWITCH = "TIERGATE_STRICT"
"""Environment variable: 1 refuses to start with another version."""


def plain_version(version: str) -> str:
    """The version without a build's mark: "0.5.23+cu129" is 0.5.23."""
    return version.partition("+")[0]
