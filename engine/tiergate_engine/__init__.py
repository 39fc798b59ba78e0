"""What ONE engine is: how long a step takes, who gets tokens in it, and the engine as a pure state machine.

* ``step``: what a step holds, and how long it takes (numbers in, seconds out).
* ``steptime``, ``curves``: step times from a formula, from measured tables, and corrected.
* ``fill``: who gets how many tokens in the next step.
* ``model``: one engine, pure: submit, abort, next_step, finish_step. Everything that emulates wraps this.
* ``contract``, ``kv``, ``lockstep``: the model's values, its KV blocks, its decodes.
* ``drive``: the step of an engine that keeps promises: time from slack, prompts by deadline.
* ``control``, ``wire``: what an engine is told over HTTP, and what it tells back.

Standard library only; no clock, no chance, no I/O. Tenants, tiers and fleets live elsewhere.
"""
