"""`tiergate demo`: the main job on one machine, beside two baselines.

* ``sizes``: what is served, by how many engines, under which load: one value for emulated engines, one for vLLM.
* ``processes``: child processes that end with the demo, whatever ends it.
* ``fleet``: engines and a gateway in front of them; ``run``: the policies one after the other, seeds side by side.
* ``show``: the live table, and the comparison at the end.

Every figure comes from the same commands a user has: `tiergate emulate`, `serve` and `bench`.
"""
