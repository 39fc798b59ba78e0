"""Engines over HTTP: translate verbs, never choose.

* ``contract``: what the gateway needs of an engine, as two small protocols and their values.
* ``http``: upstream traffic over aiohttp's client. ``exchange``: small questions on top of it.
* ``vllm``, ``sglang``, ``tgi``, ``openai``: one file an engine family; ``monitored`` is what those share that have
  metrics. ``sglang_state``: reading what SGLang tells of itself.
  ``registry``: adapters by name, and telling engines apart.
* ``errors``, ``models``, ``exposition``: reading error bodies and events, model lists, metrics.
* ``body``, ``usage``: members put into a body, and a usage event asked for, with the smallest change of it.
* ``emulated``: a real HTTP server around `tiergate_engine.model` that looks like vLLM. It emulates, and says so.
"""
