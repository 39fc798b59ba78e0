"""The decisions for a fleet: which backend serves which request, when, and what is refused.

* ``tiers``, ``requests``, ``backends``, ``load``, ``lengths``: the frozen values everything speaks in.
* ``predict``: a forward walk over one backend's steps: TTFT, TPOT, peak KV, load.
* ``feasible``: does a prediction keep every promise, the request's own and every resident's.
* ``policies``: rank candidates, choose, order the held; one small file each.
* ``dispatcher``: a pure state machine: events in, actions out. Shells carry actions out and nothing else.
* ``scoring``: attainment, goodput and slack, for load generator, simulator and dashboard alike.

Standard library and ``tiergate_engine`` only. No clock, no chance, no I/O, no log: `now_s` and a seeded
generator are arguments, so the same events give the same decisions, live and simulated.
"""
