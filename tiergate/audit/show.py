"""An audit for people, and for programs."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from tiergate.audit.compare import Difference, Verdict
from tiergate.audit.readings import Readings


def lines(read: Readings, verdict: Verdict) -> Iterator[str]:
    """What was found, line by line."""
    yield from _table(read)
    yield ""
    for number, one in enumerate(verdict.differences, 1):
        yield f"{number}. {one.kind.value}{_where(one)}"
        yield f"   {one.detail}"
        yield f"   Likely cause: {one.cause.likely}."
        yield f"   {'Heals by itself' if one.cause.heals else 'Does not heal by itself'}: {one.cause.then}."
    for unasked in read.unasked:
        yield f"Not looked at: {unasked.who}: {unasked.why}."
    if read.readings and read.readings[0].before.strays is None:
        yield "Not looked for: keys that belong to nobody (this user may not SCAN)."
    count = len(verdict.differences)
    found = "no difference" if not count else "1 difference" if count == 1 else f"{count} differences"
    yield (
        f"{found.capitalize()}. Everything was read {len(read.readings)} times within {read.seconds:.1f} s, and "
        f"what was not there every time is not told ({verdict.passing} of those: requests on their way)."
    )


def _where(one: Difference) -> str:
    parts = [f"backend {one.backend}" if one.backend else "", f"replica {one.replica}" if one.replica else ""]
    told = ", ".join(part for part in parts if part)
    return f": {told}" if told else ""


def _table(read: Readings) -> Iterator[str]:
    """Each backend: what the store counts, what each replica carries, what the engine says."""
    last = read.readings[-1]
    store = last.after
    replicas = len(store.live)
    yield (
        f"{len(store.standings)} backends, {replicas} live replicas, {len(store.orphans)} dead ones whose load "
        f"still counts; {len(store.leases)} leases."
    )
    for replica, silent_s in sorted(store.live.items()):
        told = last.told.get(replica)
        stands = "was not asked" if told is None else f"stands {told.mode}, carries {len(told.leases)} leases"
        yield f"  replica {replica}: last sign of life {silent_s:.1f} s ago, {stands}"
    for backend, standing in sorted(store.standings.items()):
        sequences = last.engines.get(backend)
        engine = "does not say" if sequences is None else f"has {sequences} running and waiting"
        tier = "the pool" if standing.tier is None else f"tier {standing.tier}"
        yield f"  backend {backend} in {tier}, epoch {standing.epoch}: {standing.total}; the engine {engine}"
        for (replica, name), part in sorted(store.parts.items()):
            if name == backend and not part.load.idle:
                yield f"    {replica}: {part.load}"


def as_json(read: Readings, verdict: Verdict) -> bytes:
    """The same for programs."""
    last = read.readings[-1]
    store = last.after
    told = {
        "differences": [
            {
                "kind": one.kind.value,
                "backend": one.backend,
                "replica": one.replica,
                "lease": one.lease,
                "detail": one.detail,
                "likely_cause": one.cause.likely,
                "heals_by_itself": one.cause.heals,
                "then": one.cause.then,
            }
            for one in verdict.differences
        ],
        "not_looked_at": [{"who": one.who, "why": one.why} for one in read.unasked],
        "readings": len(read.readings),
        "seconds": read.seconds,
        "passing": verdict.passing,
        "replicas": {
            replica: {
                "silent_s": silent_s,
                "mode": last.told[replica].mode if replica in last.told else None,
                "leases": len(last.told[replica].leases) if replica in last.told else None,
            }
            for replica, silent_s in store.live.items()
        },
        "orphans": dict(store.orphans),
        "backends": {
            backend: {
                "tier": standing.tier,
                "epoch": standing.epoch,
                "sequences": standing.total.decodes,
                "kv_tokens": standing.total.kv_tokens,
                "prefill_tokens": standing.total.prefill_tokens,
                "leases": standing.total.leases,
                "engine_sequences": last.engines.get(backend),
                "replicas": {
                    replica: {"sequences": part.load.decodes, "leases": part.load.leases}
                    for (replica, name), part in store.parts.items()
                    if name == backend
                },
            }
            for backend, standing in store.standings.items()
        },
    }
    return orjson.dumps(told, option=orjson.OPT_INDENT_2)
