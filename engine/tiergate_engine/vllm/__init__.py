"""vLLM, driven: a scheduler that plans each step before vLLM's own fills it, and the channel to speak with it.

``VLLM_PLUGINS=tiergate vllm serve MODEL --scheduler-cls tiergate_engine.vllm.Scheduler`` starts an engine with it.
Where vLLM has no endpoint plug-ins, ``--middleware tiergate_engine.vllm.channel.ControlMiddleware`` in its place.

* ``scheduler``: vLLM's scheduler with a plan around its `schedule`; the only file that stands on vLLM's insides.
* ``pilot``: what is planned from what runs and waits; knows vLLM by the attributes it reads.
* ``waiting``: the queue by deadline.
* ``facts``: what each step held, and how long it took.
* ``channel``, ``calls``: the HTTP routes in vLLM's API server, and their other end in the engine's process.

Until somebody gives orders, vLLM schedules as if this were not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.interface import SchedulerInterface

__all__ = ["Scheduler"]


def Scheduler(**settings: object) -> SchedulerInterface:  # noqa: N802 (vLLM's option names a class; this makes one)
    """The scheduler of this engine: vLLM's synchronous or asynchronous one, as its settings ask, driven.

    vLLM calls it with keywords, as it calls a scheduler's class. An untested version of vLLM gets vLLM's own
    scheduler and a warning. Raises RuntimeError for it when the environment variable TIERGATE_STRICT is 1.
    """
    from tiergate_engine.vllm.scheduler import make  # noqa: PLC0415 (the package is read where vLLM is not there)

    return make(settings)
