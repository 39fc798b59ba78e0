"""What is left of a run: what every client saw, what every engine and gateway wrote down, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from adapters.emulated.journal import Entry, Fate, read_journal
from tests.chaos.faults import Harm, Window
from tests.chaos.load import Client
from tests.chaos.stand import Stand


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a gateway's request log. `end`: finished, failed, cancelled or refused."""

    gateway: str
    request_id: str
    backend: str | None
    end: str
    output_tokens: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Passage:
    """One sequence's time on an engine. `until_s` and `fate` are None when the engine died with it."""

    engine: str
    request_id: str
    from_s: float
    until_s: float | None
    fate: Fate | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it. Times are wall-clock seconds of one machine."""

    clients: Sequence[Client]
    windows: Sequence[Window]
    journals: Mapping[str, Sequence[Entry]]
    records: Sequence[Record]
    passages: Mapping[str, Sequence[Passage]] = field(default_factory=dict)  # by request

    def faults_of(self, target: str, *harms: Harm) -> list[Window]:
        """What happened to one actor."""
        return [
            one for one in self.windows if one.fault.target == target and (not harms or one.fault.harm in harms)
        ]


def gather(stand: Stand, clients: Sequence[Client], windows: Sequence[Window]) -> Evidence:
    """Read everything that was written down."""
    journals = {name: list(read_journal(stand.journal(name))) for name in stand.engines}
    records = [record for name in stand.gateways for record in _records(name, stand.request_log(name))]
    return Evidence(clients, windows, journals, records, passages_of(journals))


def passages_of(journals: Mapping[str, Sequence[Entry]]) -> dict[str, list[Passage]]:
    """What every engine did with every request, by request."""
    passages: dict[str, list[Passage]] = {}
    for name, entries in journals.items():
        for passage in _passages(name, entries):
            passages.setdefault(passage.request_id, []).append(passage)
    return passages


def _records(gateway: str, path: Path) -> list[Record]:
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            one = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # the gateway was killed in the middle of it
        found.append(
            Record(gateway, one["request_id"], one["backend"], one["end"], one["output_tokens"], one["time"])
        )
    return found


def _passages(engine: str, entries: Sequence[Entry]) -> list[Passage]:
    begun: dict[str, Entry] = {}
    found: list[Passage] = []
    for entry in entries:
        if entry.fate is Fate.SUBMITTED:
            begun[entry.sequence_id] = entry
            continue
        start = begun.pop(entry.sequence_id, None)
        if start is not None:
            found.append(Passage(engine, entry.request_id, start.at_s, entry.at_s, entry.fate, entry.tokens))
    found += [Passage(engine, one.request_id, one.at_s, None, None, 0) for one in begun.values()]
    return found
