"""Capacity planning: how many backends a recorded day needs, by tier, and what each promise costs.

The method, step by step (`docs/simulate.md` tells it to users):

1. The trace is cut into windows of equal length (`demand`). A window's load is its rate times the tier-packed
   reference cost of its own requests (`simulator.reference`), in backends. Windows whose cost per request is alike
   form a group and share the lengths of all of them: they differ in load only.
2. For every group the smallest fleets for the greatest and for the least load are found (`sizing`), and for every
   number of backends between the two the greatest rate of a window that it serves (`curve`): every tier with a
   promise, and all of them together, keep the target over all seeds, each answer really simulated
   (`simulator.cell.run_cell`, the same requests for every number and rate). A window gets the smallest fleet
   whose rate covers its own, so equal loads get equal fleets. For each number at most five rates are tried.
   A load beyond what may be simulated is scaled up in proportion from the greatest that is: larger fleets pool
   better, so this is on the safe side.
3. What sharing saves: the same for silos, one pool a tier, at the greatest load.
4. What each promise costs (`costs`): on one fleet, the highest rate that keeps the target, as the tiers are,
   with a tier's TPOT relaxed to the next looser one, and without that tier's requests.
"""
