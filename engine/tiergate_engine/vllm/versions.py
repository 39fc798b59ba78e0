"""Which versions of vLLM are driven, and the names by which the parts find each other."""

from __future__ import annotations

TESTED = frozenset({"0.32.0"})
"""The scheduler's attributes are not a public interface of vLLM, so a version is driven once its tests pass."""
STRICT_SWITCH = "TIERGATE_STRICT"
"""Environment variable: 1 refuses to start with a version that is not tested."""
SCHEDULER = "tiergate_engine.vllm.Scheduler"
"""What vLLM is started with: ``--scheduler-cls``."""
UTILITY = "tiergate_call"
"""The method of vLLM's EngineCore that the API server calls."""
UNTESTED_NOTE = f"this version of vLLM was not tested ({', '.join(sorted(TESTED))} was): it schedules undriven"


def plain_version(version: str) -> str:
    """The version without a build's mark: "0.32.0+cpu" is 0.32.0."""
    return version.partition("+")[0]
