"""Reading everything a fleet has in Redis, for an audit: one script for one moment, and nothing is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import orjson
from redis.exceptions import NoPermissionError

from state.inventory import CarriedPart, Counted, Inventory, Standing, StoredLease
from state.redis.codec import items, text
from state.redis.connect import ERRORS, Connection
from state.redis.directory import ADDRESS, read_addresses
from state.redis.keys import SCHEMA, Keys
from state.redis.scripts import load_script, unavailable

_SCRIPT = load_script("inventory", "clock", "parts")
_LEASES = "leases:"
_SCAN_COUNT = 1000
# Names of this version's keys behind the prefix; those with a colon go on with a replica's name.
_KNOWN = ("load", "replicas", "orphans", "held", "meta", "documents", "learned", "learned-at")
_KNOWN_BEGINNINGS = (_LEASES, "ended:", ADDRESS)


class InventoryReader:
    """Takes inventories of one fleet. The connection stays the caller's."""

    def __init__(self, connection: Connection, fleet: str, timeout_s: float = 5.0) -> None:
        """`timeout_s` is for each question. Raises ValueError for a fleet's name that no key can carry."""
        self._connection = connection
        self._fleet = fleet
        self._keys = Keys.of(fleet)
        self._timeout_s = timeout_s

    async def read(self, *, strays: bool = True) -> Inventory:
        """Everything at one moment. With `strays` the server's keys are looked through for those that belong to
        nobody, where that is allowed. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                names = await self._replicas()
                beyond: tuple[str, ...] | None = None
                if strays:
                    found = await self._scan()
                    if found is not None:
                        names |= {name.removeprefix(_LEASES) for name in found if name.startswith(_LEASES)}
                        beyond = tuple(sorted(name for name in found if not name.startswith(_LEASES)))
                picture = await self._picture(names)
                addresses = await read_addresses(self._connection, self._keys, names)
                return replace(picture, addresses=addresses, strays=beyond)
        except ERRORS as error:
            raise unavailable("inventory", error) from error

    async def _replicas(self) -> set[str]:
        """Every replica whose name stands anywhere but in a key's name."""
        keys, run = self._keys, self._connection.run
        names = {
            text(one) for key in (keys.replicas, keys.orphans) for one in items(await run("ZRANGE", key, 0, -1))
        }
        names |= {text(one) for one in items(await run("HKEYS", keys.held))}
        fields = [text(one) for one in items(await run("HKEYS", keys.load))]
        return names | {field.split("|")[1] for field in fields if field.startswith("r|")}

    async def _scan(self) -> set[str] | None:
        """Lease keys of all replicas and stray keys, behind the prefix where they have this version's; None where
        this user may not look."""
        found: set[str] = set()
        family = SCHEMA.rstrip("0123456789")
        pattern = f"{{{family}*:{self._fleet}}}:*"
        try:
            async for raw in self._connection.client.scan_iter(match=pattern, count=_SCAN_COUNT):
                key = raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)
                name = key.removeprefix(self._keys.prefix)
                if name == key:
                    found.add(key)
                elif name.startswith(_LEASES) or not (name in _KNOWN or name.startswith(_KNOWN_BEGINNINGS)):
                    found.add(name)
        except NoPermissionError:
            return None
        return found

    async def _picture(self, names: set[str]) -> Inventory:
        """One moment; `names` grows by the replicas that came meanwhile. Raises StoreUnavailable and `ERRORS`."""
        keys = self._keys
        while True:
            replicas = sorted(names)
            all_keys = [keys.load, keys.replicas, keys.orphans, keys.held, keys.meta]
            for name in replicas:
                all_keys += (keys.leases(name), keys.ended(name))
            answer = await self._connection.run("EVAL", _SCRIPT.source, len(all_keys), *all_keys, *replicas)
            picture = _inventory(text(answer))
            seen = {*picture.live, *picture.orphans, *(replica for replica, _ in picture.parts)}
            if seen <= names:
                return picture
            names |= seen


# What orjson read: numbers, texts, lists and dictionaries that are checked by being used.
_Raw = Any


def _inventory(picture: str) -> Inventory:
    """Raises StoreUnavailable."""
    try:
        return _read(orjson.loads(picture))
    except (KeyError, TypeError, ValueError) as error:
        raise unavailable("inventory", error) from error


def _read(raw: _Raw) -> Inventory:
    return Inventory(
        taken_ms=int(float(raw["now"])),
        born_ms=_number(raw["born"]),
        last_epoch=_number(raw["epoch"]),
        beaten_ms=_number(raw["beaten"]),
        standings={one[0]: _standing(one) for one in _many(raw["standings"])},
        parts={(one[0], one[1]): _part(one) for one in _many(raw["parts"])},
        paces={one[0]: {float(pace): int(count) for pace, count in _many(one[1])} for one in _many(raw["paces"])},
        leases={(one[0], one[1]): _lease(one) for one in _many(raw["leases"])},
        live=_silences(raw["replicas"]),
        orphans=_silences(raw["orphans"]),
        held=tuple(_many(raw["held"])),
        unreadable=tuple(_many(raw["unreadable"])),
    )


def _many(raw: _Raw) -> Iterable[_Raw]:
    """A list; an empty one comes as an object, because Lua does not know the difference."""
    return raw if isinstance(raw, list) else ()


def _number(raw: _Raw) -> int | None:
    return int(float(raw)) if isinstance(raw, str) else None  # false: it is not there


def _standing(raw: _Raw) -> Standing:
    _, epoch, birth, tier, tightest_ms, decodes, kv_tokens, prefill_tokens, leases, residents = raw
    load = Counted(decodes, kv_tokens, prefill_tokens, leases, dict(residents))
    return Standing(tier or None, int(float(epoch)), int(float(birth)), float(tightest_ms), load)


def _part(raw: _Raw) -> CarriedPart:
    _, _, decodes, kv_tokens, prefill_tokens, leases, measured_leases, residents, age_ms = raw
    load = Counted(decodes, kv_tokens, prefill_tokens, leases, dict(residents))
    return CarriedPart(load, measured_leases, age_ms / 1e3)


def _lease(raw: _Raw) -> StoredLease:
    _, _, backend, birth, decodes, tier, pace_ms, ended = raw
    return StoredLease(backend, int(float(birth)), int(decodes), tier, float(pace_ms), bool(ended))


def _silences(raw: _Raw) -> dict[str, float]:
    return {name: max(silent_ms, 0) / 1e3 for name, silent_ms in _many(raw)}
