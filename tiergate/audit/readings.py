"""What is read for an audit: the store, what each replica says, what each engine reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from state.inventory import Inventory
from state.mending import ALONE_SUFFIX


class Unreadable(Exception):
    """A replica's answer is not what this version understands; the message says why."""


class _Told(BaseModel):
    # A newer replica may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class CarriedLease(_Told):
    """One request that a replica has on a backend. `stage`: opening, or running once its first token came."""

    lease: str
    backend: str
    stage: str
    sequences: int


class CarriedBackend(_Told):
    """One backend as a replica knows it; `epoch` is None while it has not met the engine."""

    name: str
    url: str
    phase: str
    engine: str | None = None
    tier: str | None = None
    epoch: int | None = None
    decodes: int = 0


class Carried(_Told):
    """What one replica says of itself. `passing`: leases it is asking for, or has yet to tell the end of."""

    replica: str
    fleet: str | None
    mode: str
    backends: tuple[CarriedBackend, ...]
    leases: tuple[CarriedLease, ...]
    passing: frozenset[str]

    def backend(self, name: str) -> CarriedBackend | None:
        """A backend by its name."""
        return next((one for one in self.backends if one.name == name), None)


class _Answer(_Told):
    replicas: tuple[Carried, ...]


def read_carried(body: bytes) -> tuple[Carried, ...]:
    """The answer of `GET /admin/v1/carried`: every process behind the port. Raises Unreadable."""
    try:
        return _Answer.model_validate(orjson.loads(body)).replicas
    except (orjson.JSONDecodeError, ValidationError) as error:
        raise Unreadable(str(error).splitlines()[0]) from error


def plain_lease(lease: str) -> str:
    """A lease's name as its replica knows it: one that was granted without the store has another one there."""
    return lease.removesuffix(ALONE_SUFFIX)


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at everything: the store, then all replicas and engines at once, then the store again.

    Attributes:
        told: by replica; who did not answer is missing.
        engines: running and waiting sequences by backend; None where the engine does not say.
    """

    before: Inventory
    told: Mapping[str, Carried]
    engines: Mapping[str, int | None]
    after: Inventory


@dataclass(frozen=True, slots=True)
class Unasked:
    """Somebody who could not be asked, and why."""

    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Readings:
    """All that was read, in order. `seconds`: from the first to the last."""

    readings: Sequence[Reading]
    seconds: float
    lease_s: float
    unasked: Sequence[Unasked] = field(default_factory=tuple)
