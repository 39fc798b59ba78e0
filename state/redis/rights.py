"""What Tiergate's user may do on the store, as Redis' ACL rules: what its scripts and messages use, no more."""

from __future__ import annotations

from state.redis.keys import SCHEMA

_COMMANDS = (
    # scripts, and what they call; all of it is held to the key patterns
    "+eval +evalsha +@hash +@sortedset +del +pexpire +time",
    # where each replica can be asked
    "+get +set",
    # messages
    "+publish +subscribe",
    # what connections say
    "+ping +select +client|setname",
)
AUDIT_COMMANDS = "+scan"
"""With these as well, `tiergate state audit` finds keys that belong to nobody. SCAN shows all keys' names."""
CLUSTER_COMMANDS = "+cluster|slots +command +exists"
"""What a client of a Cluster asks besides."""
SENTINEL_RULE = "-@all +ping +client|setname +sentinel|masters"
"""All that Tiergate asks of a Sentinel."""


def acl_rule(fleet: str = "*") -> str:
    """The rights on one fleet's keys and channels, or on all fleets', as ``ACL SETUSER`` takes them.

    They are enough for one server, Sentinel's primary, and a Cluster.
    """
    keys = f"{{{SCHEMA}:{fleet}}}:*"
    return " ".join(("resetkeys", "resetchannels", f"~{keys}", f"&{keys}", "-@all", *_COMMANDS, CLUSTER_COMMANDS))
