"""What travels between the store and its handles: arguments packed for the scripts, and their answers read."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from scheduling.load import Cost, Floor, LoadVector, ReserveCandidate
from state.contract import Denied, Held, Membership, Publication, StoreUnavailable
from state.redis.connect import Answer
from state.redis.scripts import Argument


def pack_candidates(candidates: Sequence[ReserveCandidate]) -> list[Argument]:
    """The numbers of all candidates in one argument, then the backend and the tier of each."""
    numbers: list[float] = []
    names: list[Argument] = [b""]
    for one in candidates:
        cost, limits = one.cost, one.limits
        numbers += (
            cost.decodes,
            cost.peak_kv_tokens,
            cost.prefill_tokens,
            cost.tpot_ms,
            limits.decodes,
            limits.peak_kv_tokens,
            limits.queued_prefill_tokens,
            one.tightest_resident_ms,
            one.epoch,
        )
        names += (one.backend, cost.tier)
    names[0] = struct.pack(f"<{len(numbers)}d", *numbers)
    return names


def pack_publications(publications: Sequence[Publication]) -> list[Argument]:
    """The numbers of all publications in one argument, then backend, residents and slack of each."""
    numbers: list[float] = []
    names: list[Argument] = [b""]
    for one in publications:
        own = one.own
        numbers += (
            one.sequence,
            max(own.decodes, 0),
            max(own.peak_kv_tokens, 0),
            max(own.queued_prefill_tokens, 0),
            round(own.age_s * 1000.0),
        )
        residents = {tier: count for tier, count in own.residents.items() if count > 0}
        names += (one.backend, orjson.dumps(residents), dump_slack(own.slack, own.queued_slack))
    names[0] = struct.pack(f"<{len(numbers)}d", *numbers)
    return names


def pack_doubles(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def dump_slack(slack: Floor, queued_slack: Floor) -> str:
    """How it is kept in the store, which only passes it on."""
    return orjson.dumps((slack, queued_slack)).decode() if slack or queued_slack else ""


def dump_held(held: Iterable[Held]) -> bytes:
    """What a replica holds, as it is kept in the store."""
    return orjson.dumps([(one.model, one.tier, one.due_in_s, one.decodes, one.kv_tokens) for one in held])


def whole(answer: Answer) -> int:
    """An answer that has to be a number."""
    if isinstance(answer, int):
        return answer
    raise _misunderstood(answer)


def text(answer: Answer) -> str:
    """An answer that has to be a text."""
    if isinstance(answer, bytes):
        return answer.decode()
    raise _misunderstood(answer)


def name_or_none(answer: Answer) -> str | None:
    """A tier, or None for the pool."""
    return None if answer is None else text(answer)


def items(answer: Answer) -> list[Answer]:
    """An answer that has to be a list."""
    if isinstance(answer, list):
        return answer
    raise _misunderstood(answer)


def read_denied(lease_id: str, candidates: Sequence[ReserveCandidate], answer: list[Answer]) -> Denied:
    """What `reserve` says when nothing fits. Ages and slacks are not told: the mirror knows them."""
    foreign: dict[str, LoadVector] = {}
    memberships: dict[str, Membership] = {}
    for one in answer[1:]:
        index, epoch, tier, decodes, kv_tokens, prefill_tokens, pairs = items(one)
        residents = items(pairs)
        backend = candidates[whole(index)].backend
        foreign[backend] = LoadVector(
            whole(decodes),
            whole(kv_tokens),
            whole(prefill_tokens),
            {text(residents[i]): whole(residents[i + 1]) for i in range(0, len(residents), 2)},
        )
        memberships[backend] = Membership(name_or_none(tier), whole(epoch))
    return Denied(lease_id, foreign, memberships)


@dataclass(frozen=True, slots=True)
class Standing:
    """A lease that was granted before: where, by which write, under which birth of the backend, and for what."""

    backend: str
    sequence: int
    birth: int
    cost: Cost


def read_standing(answer: list[Answer]) -> Standing:
    """What `reserve` says of a lease that stands."""
    _, backend, sequence, birth, decodes, kv_tokens, prefill_tokens, tier, pace = answer
    cost = Cost(whole(decodes), whole(kv_tokens), whole(prefill_tokens), text(tier), float(text(pace)))
    return Standing(text(backend), whole(sequence), whole(birth), cost)


@dataclass(frozen=True, slots=True)
class TakenPart:
    """What one replica carries on one backend, as told."""

    backend: str
    replica: str
    membership: Membership
    load: LoadVector


@dataclass(frozen=True, slots=True)
class HeldBy:
    """What one replica holds."""

    replica: str
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class News:
    """One message of the fleet's channel.

    Attributes:
        era: when the state began; another one says that the store was emptied.
        number: of the message; they rise by one.
        sender: the replica whose doing it is.
        joined, orphaned, gone: replicas that live, that are dead but still count, that count no more.
    """

    era: int
    number: int
    sender: str
    parts: tuple[TakenPart, ...]
    members: Mapping[str, Membership]
    removed: tuple[str, ...]
    held: tuple[HeldBy, ...]
    joined: tuple[str, ...]
    orphaned: tuple[str, ...]
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredTotal:
    """A backend's sums as the store keeps them for `reserve`."""

    membership: Membership
    load: LoadVector
    leases: int
    tightest_ms: float | None


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part with what only the store counts."""

    part: TakenPart
    sequence: int
    leases: int


@dataclass(frozen=True, slots=True)
class Picture:
    """The whole state of a fleet at one moment.

    Attributes:
        epoch: the last that was given.
        number: of the last message before it was taken.
        silent_s: live replicas, and how long ago each was heard.
        orphans: replicas that were given up and whose load still counts.
    """

    era: int
    epoch: int
    number: int
    totals: Mapping[str, StoredTotal]
    parts: tuple[StoredPart, ...]
    held: tuple[HeldBy, ...]
    silent_s: Mapping[str, float]
    orphans: frozenset[str]


@dataclass(frozen=True, slots=True)
class Joined:
    """How the store stands once a replica has joined: memberships, births, the sequences of its own parts, and
    which backends it made known again."""

    era: int
    members: Mapping[str, Membership]
    births: Mapping[str, int]
    sequences: Mapping[str, int]
    remade: frozenset[str]


def read_news(payload: bytes) -> News:
    """Raises StoreUnavailable when it is not of this version."""
    try:
        raw = orjson.loads(payload)
        return News(
            int(raw["era"]),
            int(raw["n"]),
            raw["from"],
            tuple(_part(one) for one in raw.get("parts") or ()),
            {backend: Membership(tier or None, epoch) for backend, epoch, tier in raw.get("members") or ()},
            tuple(raw.get("removed") or ()),
            tuple(_held(one) for one in raw.get("held") or ()),
            tuple(raw.get("joined") or ()),
            tuple(raw.get("orphaned") or ()),
            tuple(raw.get("gone") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _misunderstood(payload) from error


def read_picture(answer: Answer) -> Picture:
    """What `view` answers."""
    try:
        raw = orjson.loads(text(answer))
        totals = {
            backend: StoredTotal(
                Membership(tier or None, epoch),
                LoadVector(decodes, kv_tokens, prefill_tokens, dict(residents)),
                leases,
                tightest_ms,
            )
            for backend, epoch, tier, decodes, kv_tokens, prefill_tokens, leases, tightest_ms, residents in raw[
                "standings"
            ]
        }
        return Picture(
            int(raw["era"]),
            int(raw["epoch"]),
            int(raw["n"]),
            totals,
            tuple(StoredPart(_part(one[:10]), one[10], one[11]) for one in raw["parts"]),
            tuple(_held(one) for one in raw["held"]),
            {name: max(silent_ms, 0) / 1000.0 for name, silent_ms in raw["replicas"]},
            frozenset(raw["orphans"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _misunderstood(answer) from error


def read_joined(answer: Answer) -> Joined:
    """What `join` answers."""
    try:
        raw = orjson.loads(text(answer))
        members = list(raw["members"])
        return Joined(
            int(raw["era"]),
            {name: Membership(tier or None, epoch) for name, epoch, tier, _, _ in members},
            {name: birth for name, _, _, birth, _ in members},
            {name: sequence for name, _, _, _, sequence in members},
            frozenset(raw["remade"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _misunderstood(answer) from error


def _part(raw: Sequence[Any]) -> TakenPart:
    backend, replica, epoch, tier, decodes, kv_tokens, prefill_tokens, age_ms, residents, slack = raw
    floors = orjson.loads(slack) if slack else ((), ())
    load = LoadVector(
        decodes, kv_tokens, prefill_tokens, dict(residents), age_ms / 1000.0, _floor(floors[0]), _floor(floors[1])
    )
    return TakenPart(backend, replica, Membership(tier or None, epoch), load)


def _floor(raw: Sequence[Any]) -> Floor:
    return tuple((tpot_s, slack_s) for tpot_s, slack_s in raw)


def _held(raw: Sequence[Any]) -> HeldBy:
    replica, packed, age_ms = raw
    age_s = age_ms / 1000.0
    return HeldBy(
        replica,
        tuple(
            Held(model, tier, due_in_s - age_s, decodes, kv_tokens)
            for model, tier, due_in_s, decodes, kv_tokens in orjson.loads(packed)
        ),
    )


def _misunderstood(answer: object) -> StoreUnavailable:
    return StoreUnavailable(f"the store answered what this version does not understand: {str(answer)[:200]}")
