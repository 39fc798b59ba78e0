"""The decisions for a fleet: which backend serves which request, when, and what is refused.

* ``tiers``, ``requests``, ``backends``, ``load``, ``lengths``: the frozen values everything speaks in.
* ``ledger``, ``fleet``: who is on which backend, brought up to date by events; tiers ordered by load.
* ``predict``: a forward walk over one backend's steps: TTFT, TPOT, peak KV, load.
* ``feasible``: does a prediction keep every promise, the request's own and every resident's.
* ``policies``: rank candidates, choose, order the held; one small file each.
* ``ladder``: how a request finds its place: ``placing`` (one look over the fleet), ``elastic`` (claims and
  hand-backs), ``refusing`` (when waiting cannot help).
* ``dispatcher``: a pure state machine: events in, actions out (``events``). Shells carry actions out and nothing
  else; ``desk`` and ``tickets`` keep its requests.
* ``scoring``: attainment, goodput and slack, for load generator, simulator and dashboard alike.

Standard library and ``tiergate_engine`` only. No clock, no chance, no I/O, no log: `now_s` and a seeded
generator are arguments, so the same events give the same decisions, live and simulated.
"""
