"""What a difference most likely comes from, and whether it heals by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from state.inventory import Damage


class Kind(Enum):
    """Differences between the store, the replicas and the engines."""

    LEAKED_LEASE = "leaked lease"
    UNCOUNTED_LEASE = "uncounted lease"
    LOAD_DRIFT = "load drift"
    DEAD_REPLICA = "dead replica"
    UNREGISTERED_REPLICA = "unregistered replica"
    ALONE = "replica on its own"
    MEMBERSHIP = "membership"
    BACKEND_NOT_IN_STORE = "backend not in store"
    NOBODYS_BACKEND = "nobody's backend"
    ENGINE_HAS_MORE = "engine has more"
    ENGINE_HAS_LESS = "engine has less"


@dataclass(frozen=True, slots=True)
class Cause:
    """`heals`: whether it goes away by itself; `then`: when it does, or what to do."""

    likely: str
    heals: bool
    then: str


_REBUILD = (
    "delete the fleet's keys but its policy while gateways run, as docs/state.md has it: each replica then tells "
    "the store anew what it carries, within a third of the lease time"
)
_OTHER_VERSION = "another program or version wrote to the fleet's keys, or a write was lost in a failover"

CAUSES: Mapping[Kind | Damage, Cause] = MappingProxyType(
    {
        Damage.TOTALS: Cause(_OTHER_VERSION, False, _REBUILD),
        Damage.NEGATIVE: Cause(_OTHER_VERSION, False, _REBUILD),
        Damage.LEASE_COUNT: Cause(_OTHER_VERSION, False, f"restart that replica, or {_REBUILD}"),
        Damage.LOAD_WITHOUT_LEASE: Cause(
            "the replica published load after its last lease there had ended",
            True,
            "with its next publication, when it next has a request there; else restart that replica",
        ),
        Damage.PACES: Cause(_OTHER_VERSION, False, _REBUILD),
        Damage.TIGHTEST: Cause(
            _OTHER_VERSION,
            True,
            "when the last lease with that pace on the backend ends; until then looser ones wait",
        ),
        Damage.UNKNOWN_BACKEND: Cause(
            "it was removed while somebody carried load on it, by a version that leaves that behind",
            True,
            "when the replica leaves the fleet; nobody reserves there",
        ),
        Damage.UNKNOWN_REPLICA: Cause(
            "its entry was lost (a failover, or keys that were deleted by hand), so nobody gives it up",
            False,
            _REBUILD,
        ),
        Damage.ENDED_LEASE: Cause(
            "a lease was written again after its end: " + _OTHER_VERSION,
            False,
            "it ends with its replica: restart that one",
        ),
        Damage.EPOCH: Cause(
            "a failover lost the last writes, or keys were written by hand",
            True,
            "with the next change of membership: epochs never fall below the server's time",
        ),
        Damage.UNREADABLE: Cause(
            "another program wrote to the fleet's keys, or a version that should have another schema tag",
            False,
            _REBUILD,
        ),
        Damage.STRAY_KEY: Cause(
            "another version of Tiergate, with another schema tag, serves or served this fleet: they do not see "
            "each other's load",
            False,
            "finish the upgrade, then delete the other version's keys",
        ),
        Damage.OVERDUE: Cause(
            "no live replica beats, or all of them are stopped", True, "as soon as one replica of the fleet runs"
        ),
        Kind.LEAKED_LEASE: Cause(
            "its end was never told, and the replica has forgotten it: it counts as a lease and by its pace, and "
            "as load until the replica publishes there again",
            False,
            "it ends with its replica: restart that one",
        ),
        Kind.UNCOUNTED_LEASE: Cause(
            "the store lost its last writes or was emptied, or the replica granted it on its own in an outage",
            True,
            "within a third of the lease time, when the replica next compares its own books with the store's",
        ),
        Kind.LOAD_DRIFT: Cause(
            "what the replica measured is not what it reserved: a publication is late, or counts too much",
            True,
            "with its next publication, every 50 ms while it has requests there",
        ),
        Kind.DEAD_REPLICA: Cause(
            "it was killed, or is stopped or cut off: what it carried may still run on the engines",
            True,
            "when the engines' own counts show it gone, at the latest two lease times after its last sign of life",
        ),
        Kind.UNREGISTERED_REPLICA: Cause(
            "it was given up while it was stopped or cut off, or the store forgot it", True, "with its next beat"
        ),
        Kind.ALONE: Cause(
            "the store did not answer it in time, or has just come back",
            True,
            "when the store answers again and the others have told what they carry, at most one lease time later",
        ),
        Kind.MEMBERSHIP: Cause(
            "it missed a message and has not looked since", True, "with its next look, at most a lease time later"
        ),
        Kind.BACKEND_NOT_IN_STORE: Cause(
            "the store was emptied, or the backend was removed by another replica that has a newer policy",
            True,
            "when the replica joins again, or follows the policy",
        ),
        Kind.NOBODYS_BACKEND: Cause(
            "it was taken out of the configuration while the store did not answer",
            False,
            "add it to the policy and remove it again; it harms nothing",
        ),
        Kind.ENGINE_HAS_MORE: Cause(
            "requests reach this engine past the gateways, or from a fleet that does not share this state",
            False,
            "give the engine to one fleet only; requests that nobody counts make promises late",
        ),
        Kind.ENGINE_HAS_LESS: Cause(
            "clients read more slowly than the engine wrote, or it lost requests that replicas wait for",
            True,
            "when the clients have read all, or the dead connections are found (timeouts.stall_s at the latest)",
        ),
    }
)
"""Every difference there is a name for."""
