"""The harness itself: faults follow from the seed, and every check says no when it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapters.emulated.journal import Entry, Fate
from loadgen.results import Answer, RequestResult
from scheduling.scoring import RequestEnd, RequestRecord
from scheduling.tiers import Slo
from tests.chaos.checks import (
    Rules,
    each_has_one_outcome,
    gateways_wrote_down_what_they_did,
    none_is_answered_twice,
    none_is_lost_without_an_error,
    nothing_is_oversold,
    peaks,
    what_clients_saw_is_what_engines_did,
)
from tests.chaos.evidence import Evidence, Passage, Record, passages_of
from tests.chaos.faults import Fault, Harm, Menu, Window, draw_faults
from tests.chaos.load import Client
from workloads.plan import PlannedRequest

RULES = Rules(frozenset({"gateway0", "gateway1"}), cap=2, lease_s=1.0)
TOKENS = 5


def _client(number: int, end: RequestEnd = RequestEnd.FINISHED, *, tokens: int = TOKENS, **more: object) -> Client:
    slo = Slo(1.0, 0.1)
    planned = PlannedRequest(number, 0.0, "chat", slo, 10, TOKENS)
    reason = more.get("reason")
    assert reason is None or isinstance(reason, str)
    times = tuple(0.1 * place for place in range(tokens))
    record = RequestRecord("chat", slo, 0.0, end, 1.0, times, reason=reason)
    status = more.get("status", 200)
    assert status is None or isinstance(status, int)
    result = RequestResult(planned, record, Answer(status, backend="engine0"), 0.0)
    return Client(f"chaos-{number}", "gateway0", result, 100.0, 101.0, vanished=False)


def _evidence(
    clients: list[Client],
    entries: list[Entry] | None = None,
    records: list[Record] | None = None,
    windows: list[Window] | None = None,
) -> Evidence:
    journals = {"engine0": entries or []}
    return Evidence(clients, windows or [], journals, records or [], passages_of(journals))


def _window(harm: Harm, target: str, from_s: float, until_s: float) -> Window:
    return Window(Fault(0.0, harm, target, until_s - from_s), from_s, until_s)


def _entries(*told: tuple[float, Fate, int, int], tokens: int = TOKENS) -> list[Entry]:
    """Journal lines: when, what, whose, and how many are open then."""
    return [
        Entry(at_s, fate, f"chatcmpl-chaos-{number}-0-0-{number:08x}", tokens, sequences)
        for at_s, fate, number, sequences in told
    ]


def test_faults_follow_from_the_seed_and_leave_each_other_room() -> None:
    menus = [
        Menu(Harm.KILL, ("a", "b"), 3.0, 0.5, 1.0),
        Menu(Harm.PAUSE, ("a", "c"), 3.0, 0.5, 1.0),
    ]
    drawn = draw_faults(7, 1.0, 60.0, menus, most_down=2)
    assert drawn == draw_faults(7, 1.0, 60.0, menus, most_down=2)
    assert drawn != draw_faults(8, 1.0, 60.0, menus, most_down=2)
    assert {fault.harm for fault in drawn} == set(Harm)
    assert all(fault.at_s >= 1.0 and fault.at_s + fault.for_s <= 60.0 for fault in drawn)
    for fault in drawn:
        during = [one for one in drawn if one.at_s <= fault.at_s < one.at_s + one.for_s]
        assert len(during) <= 2
        assert len({one.target for one in during}) == len(during)


def test_an_answer_of_another_length_or_none_at_all_is_told() -> None:
    good = _client(1)
    assert not list(each_has_one_outcome(_evidence([good]), RULES))
    for wrong in (_client(2, tokens=TOKENS + 1), _client(3, RequestEnd.UNFINISHED), good):
        assert len(list(each_has_one_outcome(_evidence([good, wrong]), RULES))) == 1


def test_who_is_cut_off_without_a_word_is_told_unless_the_gateway_was_killed() -> None:
    cut = _client(1, RequestEnd.FAILED, reason="connection", status=None)
    told = _client(2, RequestEnd.FAILED, reason="upstream_failed", status=502)
    assert len(list(none_is_lost_without_an_error(_evidence([cut, told]), RULES))) == 1
    killed = _window(Harm.KILL, "gateway0", 100.5, 103.0)
    other = _window(Harm.KILL, "gateway1", 100.5, 103.0)
    paused = _window(Harm.PAUSE, "gateway0", 100.5, 103.0)
    assert not list(none_is_lost_without_an_error(_evidence([cut], windows=[killed]), RULES))
    for excuse in (other, paused):
        assert list(none_is_lost_without_an_error(_evidence([cut], windows=[excuse]), RULES))
    assert not list(none_is_lost_without_an_error(_evidence([replace(cut, vanished=True)]), RULES))


def test_a_request_that_is_finished_twice_is_told_unless_the_first_answer_was_lost() -> None:
    entries = _entries(
        (100.0, Fate.SUBMITTED, 1, 1),
        (100.5, Fate.FINISHED, 1, 0),
        (100.6, Fate.SUBMITTED, 1, 1),
        (100.9, Fate.FINISHED, 1, 0),
    )
    assert len(list(none_is_answered_twice(_evidence([_client(1)], entries), RULES))) == 1
    killed = _window(Harm.KILL, "engine0", 100.55, 100.58)
    assert not list(none_is_answered_twice(_evidence([_client(1)], entries, windows=[killed]), RULES))


def test_an_answer_that_no_engine_finished_is_told() -> None:
    whole = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.5, Fate.FINISHED, 1, 0))
    assert not list(what_clients_saw_is_what_engines_did(_evidence([_client(1)], whole), RULES))
    short = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.5, Fate.FINISHED, 1, 0), tokens=TOKENS - 1)
    cut = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.5, Fate.ABORTED, 1, 0))
    for entries in (short, cut, []):
        assert len(list(what_clients_saw_is_what_engines_did(_evidence([_client(1)], entries), RULES))) == 1


def test_a_request_that_runs_in_two_places_at_once_is_told() -> None:
    evidence = _evidence([_client(1)])
    first = Passage("engine0", "chaos-1", 100.0, 101.0, Fate.FINISHED, TOKENS)
    second = Passage("engine1", "chaos-1", 100.5, 100.8, Fate.ABORTED, 1)
    both = replace(evidence, passages={"chaos-1": [first, second]})
    assert len(list(what_clients_saw_is_what_engines_did(both, RULES))) == 1
    after = replace(evidence, passages={"chaos-1": [first, replace(second, from_s=101.1, until_s=101.2)]})
    assert not list(what_clients_saw_is_what_engines_did(after, RULES))


def test_a_request_that_no_gateway_or_the_wrong_one_logged_is_told() -> None:
    entries = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.5, Fate.FINISHED, 1, 0))
    record = Record("gateway0", "chaos-1", "engine0", "finished", TOKENS, 100.5)
    clients = [_client(1)]
    check = gateways_wrote_down_what_they_did
    assert not list(check(_evidence(clients, entries, [record]), RULES))
    assert len(list(check(_evidence(clients, entries, []), RULES))) == 1
    assert len(list(check(_evidence(clients, entries, [replace(record, gateway="gateway1")]), RULES))) == 1
    assert len(list(check(_evidence(clients, entries, [record, record]), RULES))) == 1
    assert len(list(check(_evidence([], entries, []), RULES))) == 1
    killed = _window(Harm.KILL, "gateway0", 100.2, 102.0)
    assert not list(check(_evidence(clients, entries, [], [killed]), RULES))


@pytest.mark.parametrize(
    ("window", "oversold"),
    [
        (None, True),
        (_window(Harm.KILL, "redis", 99.0, 99.5), False),
        (_window(Harm.KILL, "redis", 90.0, 95.0), True),
        (_window(Harm.PAUSE, "engine0", 99.5, 100.1), False),
        (_window(Harm.PAUSE, "engine1", 99.5, 100.1), True),
        (_window(Harm.KILL, "gateway0", 99.5, 100.1), True),
    ],
)
def test_more_than_the_cap_is_told_but_for_times_without_the_store(window: Window | None, oversold: bool) -> None:
    entries = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.1, Fate.SUBMITTED, 2, 2), (100.2, Fate.SUBMITTED, 3, 3))
    evidence = _evidence([], entries, windows=[] if window is None else [window])
    assert bool(list(nothing_is_oversold(evidence, RULES))) is oversold
    calm, troubled = peaks(evidence, RULES)
    assert max(peak.sequences for peak in [*calm.values(), *troubled.values()]) == 3


def test_a_gateways_own_question_is_no_client_and_a_killed_engine_begins_anew() -> None:
    entries = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.1, Fate.SUBMITTED, 2, 2))
    entries.append(Entry(100.2, Fate.SUBMITTED, "cmpl-0123-0-0-00000003", 0, 3))
    entries += _entries((100.3, Fate.SUBMITTED, 4, 1), (100.4, Fate.SUBMITTED, 5, 2))
    assert not list(nothing_is_oversold(_evidence([], entries), RULES))
    assert peaks(_evidence([], entries), RULES)[0]["engine0"].sequences == 2


def test_a_gateway_that_is_stopped_over_an_outage_may_not_oversell_when_it_goes_on() -> None:
    entries = _entries((100.0, Fate.SUBMITTED, 1, 1), (100.1, Fate.SUBMITTED, 2, 2), (100.2, Fate.SUBMITTED, 3, 3))
    over_it = _window(Harm.PAUSE, "gateway0", 90.5, 99.9)
    ended = _window(Harm.KILL, "redis", 90.0, 91.0)
    lasting = _window(Harm.KILL, "redis", 90.0, 99.9)
    assert list(nothing_is_oversold(_evidence([], entries, windows=[ended, over_it]), RULES))
    assert not list(nothing_is_oversold(_evidence([], entries, windows=[lasting, over_it]), RULES))
