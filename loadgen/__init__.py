"""Open-loop load against any OpenAI base URL, and what its clients saw.

* ``traces``: real traces in their native formats; slices and scaling.
* ``arrivals``: when requests come.
* ``workload``: who comes: tiers, lengths, prompts; everything seeded.
* ``client``, ``sse``: sends on schedule whatever the server does, and counts tokens.
* ``search``: the highest rate that keeps a given attainment.
* ``report``: tables, JSON, figures.

Latency counts from the SCHEDULED arrival, so a server that stalls cannot hide the wait (no coordinated omission).
"""
