"""Every key and channel of the store. All of a fleet's carry one hash tag, so that in a Cluster one script sees
them all; the schema tag in it keeps versions that do not understand each other apart.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = "tg1"
"""Changes when a version reads or writes anything that the one before would misread."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one fleet. docs/state.md says what is in them."""

    load: str
    replicas: str
    orphans: str
    held: str
    meta: str
    channel: str
    prefix: str

    @classmethod
    def of(cls, fleet: str) -> Keys:
        """Raises ValueError when the fleet's name would break the hash tag."""
        if not fleet or any(mark in fleet for mark in "{} \t\r\n"):
            raise ValueError(f"fleet name {fleet!r} must be one word without braces")
        prefix = f"{{{SCHEMA}:{fleet}}}:"
        return cls(
            load=prefix + "load",
            replicas=prefix + "replicas",
            orphans=prefix + "orphans",
            held=prefix + "held",
            meta=prefix + "meta",
            channel=prefix + "news",
            prefix=prefix,
        )

    def leases(self, replica: str) -> str:
        """The leases of one replica."""
        return f"{self.prefix}leases:{replica}"

    def ended(self, replica: str) -> str:
        """Leases of one replica that ended lately."""
        return f"{self.prefix}ended:{replica}"

    def other(self, name: str) -> str:
        """A key of the fleet for something else that is shared, such as its documents."""
        return f"{self.prefix}{name}"
