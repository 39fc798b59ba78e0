"""An emulated engine: a real HTTP server around `tiergate_engine.model` that looks like vLLM. It emulates.

No model runs. Step times come from a latency profile, scheduling from `EngineModel`, text from a word list.

* ``server``: the routes, and `serving`, which runs engines on ports of their own in one process.
* ``driver``: one `EngineModel` in real time, on an absolute schedule.
* ``generation``: the routes that cost steps. ``answers``, ``sse``, ``messages``: the bytes, one write a token.
* ``protocol``, ``prompts``, ``tokens``, ``errors``: bodies, token counting, texts and lengths, error shapes.
* ``profiled``: settings from a latency profile.
* ``exposition``, ``histograms``, ``lag``: /metrics under vLLM's names.
"""

from adapters.emulated.server import EmulatedEngine, Served, serving
from adapters.emulated.settings import EmulatedSettings, Faults

__all__ = ["EmulatedEngine", "EmulatedSettings", "Faults", "Served", "serving"]
