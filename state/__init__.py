"""Who carries what: one contract (``contract``), in memory (``memory``, ``parts``).

A store keeps vectors and compares limits; it never predicts and never chooses.
"""
