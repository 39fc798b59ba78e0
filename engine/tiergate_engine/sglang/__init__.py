"""SGLang, driven: its chunks can be set while it runs, over the route that it has for settings.

Installed beside SGLang it is loaded by itself (entry points of the group ``sglang.srt.plugins``;
``SGLANG_PLUGINS=tiergate`` leaves others out). Until somebody sets something, SGLang schedules as if it were not
there. What is set holds for good: who set it has to lift it.

* ``knobs``: the settings, put around two methods of SGLang's scheduler; knows it by the attributes it reads.
* ``versions``: which versions of SGLang it was written after. It was not run inside any of them.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os

from tiergate_engine.sglang.versions import READ, STRICT_SWITCH, plain_version

__all__ = ["register"]

_log = logging.getLogger("tiergate.sglang")
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def register() -> None:
    """Put the settings into this process's SGLang. SGLang calls it in each of its processes.

    A version of SGLang that this was not written after stays as it is, with a warning. Raises SystemExit for it
    when the environment variable TIERGATE_STRICT is 1; SGLang passes over lesser errors of a plug-in.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415 (read without SGLang too)

    from tiergate_engine.sglang.knobs import LiveKnobs  # noqa: PLC0415

    version = plain_version(importlib.metadata.version("sglang"))
    if version not in READ:
        said = f"SGLang {version} is none that Tiergate's plug-in was written after ({', '.join(sorted(READ))})"
        if os.environ.get(STRICT_SWITCH) == "1":
            raise SystemExit(f"{said}. Install one of them, or unset {STRICT_SWITCH} to run it as it is.")
        _log.warning("%s: its chunks stay as they were started", said)
        return
    knobs = LiveKnobs(_log.warning)
    HookRegistry.register(f"{_SCHEDULER}.set_internal_state", knobs.around_set, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.get_internal_state", knobs.after_get, HookType.AFTER)
