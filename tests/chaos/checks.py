"""What has to be true of every run. Each check reads the evidence and says what contradicts it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapters.emulated.journal import Entry, Fate
from scheduling.scoring import RequestEnd
from tests.chaos.evidence import Evidence, Passage
from tests.chaos.faults import Harm
from tests.chaos.load import PREFIX, Client

# Log lines of a gateway are written in batches, so one that is killed takes the last ones with it.
_LOG_BATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class Rules:
    """What the run was set to.

    Attributes:
        gateways: names.
        cap: most sequences on an engine.
        lease_s: the store's lease time.
        calm_s: how long after a fault its consequences may still show in the engines' count.
    """

    gateways: frozenset[str]
    cap: int
    lease_s: float
    calm_s: float = 1.0


def each_has_one_outcome(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """Every request that was sent has one outcome, and an answer has exactly the tokens that were asked for."""
    for name, count in Counter(client.request_id for client in evidence.clients).items():
        if count != 1:
            yield f"{name} has {count} outcomes"
    for client in evidence.clients:
        record, planned = client.result.record, client.result.planned
        if record.end is RequestEnd.UNFINISHED:
            yield f"{client.request_id} at {client.gateway} never ended"
        elif record.end is RequestEnd.FINISHED and record.output_tokens != planned.output_tokens:
            yield (
                f"{client.request_id} at {client.gateway} was answered with {record.output_tokens} tokens, "
                f"not {planned.output_tokens}"
            )


def none_is_lost_without_an_error(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """Who is not served is told so: by a status or an error event, or because its gateway was killed."""
    for client in evidence.clients:
        result = client.result
        if result.record.end in {RequestEnd.FINISHED, RequestEnd.UNFINISHED} or client.vanished:
            continue
        told = (result.answer.status or 0) >= 400 or result.record.reason not in {"connection", "stream_broken"}
        if told:
            continue
        deaths = evidence.faults_of(client.gateway, Harm.KILL)
        if not any(one.touches(client.sent_s, client.ended_s) for one in deaths):
            yield (
                f"{client.request_id} at {client.gateway} was cut off without a word after "
                f"{client.ended_s - client.sent_s:.2f} s ({result.answer.message}), and its gateway lived"
            )


def none_is_answered_twice(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """A request is finished once; a second time only if the engine was in trouble when it first was."""
    for name, passages in evidence.passages.items():
        finished = [one for one in passages if one.fate is Fate.FINISHED]
        for one in finished[:-1]:
            if not _lost(evidence, one):
                where = ", ".join(passage.engine for passage in finished)
                yield f"{name} was finished {len(finished)} times, on {where}"


def _lost(evidence: Evidence, passage: Passage) -> bool:
    until_s = passage.until_s or passage.from_s
    return any(
        window.fault.target == passage.engine and window.touches(passage.from_s, until_s + _LOG_BATCH_S)
        for window in evidence.windows
    )


def what_clients_saw_is_what_engines_did(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """Every answer came whole from one engine, and no request ran twice at the same time."""
    for client in evidence.clients:
        passages = evidence.passages.get(client.request_id, ())
        if client.result.record.end is RequestEnd.FINISHED:
            served = client.result.answer.backend
            tokens = client.result.planned.output_tokens
            whole = [one for one in passages if one.fate is Fate.FINISHED and one.engine == served]
            if not any(one.tokens == tokens for one in whole):
                yield f"{client.request_id} was answered by {served}, which did not finish it with {tokens} tokens"
        ordered = sorted(passages, key=lambda one: one.from_s)
        for first, second in itertools.pairwise(ordered):
            end_s = first.until_s
            if end_s is not None and second.from_s < end_s and not _lost(evidence, first):
                yield (
                    f"{client.request_id} ran on {first.engine} until {end_s - second.from_s:.3f} s after it was "
                    f"begun on {second.engine}"
                )


def gateways_wrote_down_what_they_did(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """Each request that an engine took is in the log of the one gateway that its client asked, and in no other."""
    by_request: dict[str, list[str]] = {}
    for record in evidence.records:
        by_request.setdefault(record.request_id, []).append(record.gateway)
    asked = {client.request_id: client for client in evidence.clients}
    for name, gateways in by_request.items():
        client = asked.get(name)
        if client is None:
            yield f"{name} was logged by {gateways[0]}, but no client sent it"
        elif gateways != [client.gateway]:
            yield f"{name} was sent to {client.gateway} and logged by {', '.join(gateways)}"
    for name in evidence.passages:
        if not name.startswith(PREFIX):
            continue  # a gateway's own question to the engine, when it met it
        if name not in asked:
            yield f"{name} ran on an engine, but no client sent it"
        elif name not in by_request and not _died(evidence, asked[name]):
            yield f"{name} ran on an engine, and {asked[name].gateway}, which lived, did not log it"


def _died(evidence: Evidence, client: Client) -> bool:
    kills = evidence.faults_of(client.gateway, Harm.KILL)
    return any(one.touches(client.sent_s, client.ended_s + _LOG_BATCH_S) for one in kills)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most sequences an engine had, by its own count."""

    engine: str
    at_s: float
    sequences: int


def peaks(evidence: Evidence, rules: Rules) -> tuple[dict[str, Peak], dict[str, Peak]]:
    """Each engine's peak while the store lived and the engine itself was well, and its peak at all other times."""
    calm: dict[str, Peak] = {}
    troubled: dict[str, Peak] = {}
    for engine, entries in evidence.journals.items():
        after_s = rules.lease_s + rules.calm_s
        away = [(outage.from_s, outage.until_s + after_s) for outage in evidence.faults_of("redis")]
        away += [(window.from_s, window.until_s + rules.calm_s) for window in evidence.faults_of(engine)]
        for at_s, sequences in _of_clients(entries):
            kept = troubled if any(since <= at_s <= until for since, until in away) else calm
            if engine not in kept or sequences > kept[engine].sequences:
                kept[engine] = Peak(engine, at_s, sequences)
    return calm, troubled


def _of_clients(entries: Sequence[Entry]) -> Iterator[tuple[float, int]]:
    """The engine's count over time, without the one-token question of a gateway that meets it."""
    open_now: set[str] = set()
    for entry in entries:
        if entry.fate is Fate.SUBMITTED:
            open_now.add(entry.sequence_id)
        else:
            open_now.discard(entry.sequence_id)
        if len(open_now) != entry.open_sequences:  # the engine was killed, and all it had with it
            open_now = {entry.sequence_id} if entry.fate is Fate.SUBMITTED else set()
        probes = sum(f"-{PREFIX}" not in name for name in open_now)
        yield entry.at_s, entry.open_sequences - probes


def nothing_is_oversold(evidence: Evidence, rules: Rules) -> Iterator[str]:
    """While the store lives, no engine has more of the clients' sequences, running and waiting, than the cap."""
    calm, _ = peaks(evidence, rules)
    for peak in calm.values():
        if peak.sequences > rules.cap:
            yield f"{peak.engine} had {peak.sequences} sequences at {peak.at_s:.3f}, {rules.cap} are allowed"


CHECKS = (
    each_has_one_outcome,
    none_is_lost_without_an_error,
    none_is_answered_twice,
    what_clients_saw_is_what_engines_did,
    gateways_wrote_down_what_they_did,
    nothing_is_oversold,
)
