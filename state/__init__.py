"""Who carries what: one contract (``contract``), in memory (``memory``) and on Redis.

A store keeps vectors and compares limits; it never predicts and never chooses.
"""
