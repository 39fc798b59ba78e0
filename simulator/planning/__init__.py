"""Capacity planning: how many backends a recorded day needs, by tier, and what each promise costs.

The method, step by step (`docs/simulate.md` tells it to users):

1. The trace is cut into windows of equal length (`demand`). A window's load is its rate times the tier-packed
   reference cost of its own requests (`simulator.reference`), in backends. Windows whose cost per request is alike
   form a group and share the lengths of all of them: they differ in load only.
2. For every group the fleet is sized at a few loads (`sizing`): the smallest number of backends at which every
   tier with a promise, and all of them together, keep the target over all seeds, each number really simulated
   (`simulator.cell.run_cell`, the same requests for every number). The greatest load comes first, then the least,
   then the middle of gaps where the two answers differ. Windows between two loads are interpolated and rounded up.
   A load beyond what may be simulated is scaled up in proportion from the greatest that is: larger fleets pool
   better, so this is on the safe side.
3. What sharing saves: the same for silos, one pool a tier, at the greatest load.
4. What each promise costs (`costs`): on one fleet, the highest rate that keeps the target, as the tiers are,
   with a tier's TPOT relaxed to the next looser one, and without that tier's requests.
"""
