"""Open-loop load against any OpenAI base URL, and what its clients saw.

* ``prompts``: what is sent for a planned request (``workloads`` plans it).
* ``client``, ``sse``: sends on schedule whatever the server does, and counts tokens.
* ``search``: the highest rate that keeps a given attainment.
* ``report``: tables, JSON, figures.

Latency counts from the SCHEDULED arrival, so a server that stalls cannot hide the wait (no coordinated omission).
"""
