"""A vLLM plug-in that lets a CPU server share a machine of few cores.

vLLM's engine and worker talk through shared memory, and wait for each other in a loop around `sched_yield`. On a
machine with no core to spare that loop keeps every other process from running for hundreds of milliseconds, so
whatever is measured beside it measures the loop. Here the wait sleeps briefly instead.
"""

from __future__ import annotations

import logging
import os
import time

WAIT_S = 100e-6
SWITCH = "KEEP_VLLM_SPIN"


def _wait() -> None:
    time.sleep(WAIT_S)


def register() -> None:
    """Replace the busy wait, unless the environment variable KEEP_VLLM_SPIN is 1."""
    if os.environ.get(SWITCH) == "1":
        return
    from vllm.distributed.device_communicators import shm_broadcast  # noqa: PLC0415 (vLLM loads plug-ins early)

    if not hasattr(shm_broadcast, "sched_yield"):
        raise RuntimeError("vLLM's shm_broadcast has no sched_yield to replace: this plug-in is for vLLM 0.32")
    shm_broadcast.sched_yield = _wait
    logging.getLogger("vllm.tiergate").info("tiergate_vllm_cpu: process %d waits by sleeping", os.getpid())
