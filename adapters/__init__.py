"""Engines over HTTP: translate verbs, never choose.

* ``contract``: what the gateway needs of an engine, as two small protocols and their values.
* ``http``: upstream traffic over aiohttp's client.
* ``vllm``, ``openai``: one file an engine family.
* ``emulated``: a real HTTP server around `tiergate_engine.model` that looks like vLLM. It emulates, and says so.
"""
