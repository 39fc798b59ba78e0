"""What a campaign found, row by row: goodputs with intervals, ratios paired by seed, parts of optimal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import (
    EVERY_TIER,
    MAIN,
    TARGETS,
    Goodput,
    Ratio,
    Search,
    Target,
    attainment,
    ratio,
)
from simulator.campaign.interval import Interval, t_interval
from simulator.campaign.knobs import Searched, Trial
from simulator.campaign.plan import Known
from simulator.campaign.scale import ceilings_of
from simulator.campaign.table import RIVALS, Entry, Row, Section
from simulator.outcome import CellOutcome
from simulator.scenario import Cell


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A goodput run again, longer: the rate, and the attainment at it."""

    rate_rps: float
    overall: Interval
    every_tier: Interval


@dataclass(frozen=True, slots=True)
class Line:
    """A contender in a row that was searched.

    Attributes:
        label: the contender with its knobs.
        goodputs: of every target.
        of_optimal: goodput at 90 % overall over the tier-packed reference of its form.
        rates: how many were run with every seed.
        guided: one rate, moved along the curves of an earlier campaign.
        confirmed: None where nothing was confirmed.
        above_ceiling: targets whose goodput no policy could keep up for long. A finite run may lawfully be a
            little above it (`simulator.bounds.check_not_above` is exact for one run); more is a bug somewhere.
    """

    entry: Entry
    label: str
    search: Search
    goodputs: Mapping[Target, Goodput]
    of_optimal: Interval
    rates: int
    guided: bool
    confirmed: Confirmed | None
    above_ceiling: tuple[Target, ...]

    @property
    def main(self) -> Goodput:
        return self.goodputs[MAIN]


@dataclass(frozen=True, slots=True)
class Gain:
    """What a contender serves more than another in the same row."""

    row: Row
    name: str
    against: str
    target: Target
    ratio: Ratio


@dataclass(frozen=True, slots=True)
class TrialLine:
    """A contender at a fixed rate: attainment over seeds, overall, of the worst tier, and tier by tier."""

    entry: Entry
    label: str
    cells: tuple[Cell, ...]
    part: float
    rate_rps: float
    overall: Interval
    every_tier: Interval
    tiers: tuple[tuple[str, Interval], ...]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was found; entries whose cells failed are named instead."""

    lines: tuple[Line, ...]
    gains: tuple[Gain, ...]
    trials: tuple[TrialLine, ...]
    unfinished: tuple[Entry, ...]

    def of(self, section: Section) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.entry.row.section is section)


def results(entries: Iterable[Entry], known: Known) -> Results:
    """Read the outcomes of all entries."""
    lines: list[Line] = []
    trials: list[TrialLine] = []
    unfinished: list[Entry] = []
    for entry in entries:
        if entry.plan.wanted(known):
            unfinished.append(entry)
        elif isinstance(entry.plan, Trial):
            trials += _trial_lines(entry, entry.plan, known)
        else:
            lines.append(_line(entry, entry.plan, known))
    return Results(tuple(lines), tuple(_gains(lines)), tuple(trials), tuple(unfinished))


def _line(entry: Entry, plan: Searched, known: Known) -> Line:
    search = plan.search(known)
    assert search is not None, "the entry is finished"
    goodputs = {target: search.goodput(target, known) for target in TARGETS}
    optimal = entry.scale.optimal(entry.form)
    main = goodputs[MAIN]
    return Line(
        entry,
        search.subject.contender.label,
        search,
        goodputs,
        t_interval([one.rate / optimal for one in main.by_seed]),
        len(search.parts(known)),
        search.is_guided(known),
        _confirmed(entry, known),
        _above(entry, goodputs),
    )


def _confirmed(entry: Entry, known: Known) -> Confirmed | None:
    if entry.confirm is None:
        return None
    cells, outcomes = entry.confirm.cells(known), entry.confirm.outcomes(known)
    if not outcomes:
        return None
    return Confirmed(cells[0].rate_rps, attainment(MAIN, outcomes), attainment(EVERY_TIER, outcomes))


def _above(entry: Entry, goodputs: Mapping[Target, Goodput]) -> tuple[Target, ...]:
    ceilings = ceilings_of(entry.row.workload, entry.row.fleet, entry.form)
    limits = {MAIN: ceilings.most_rps, EVERY_TIER: ceilings.every_tier_rps}
    return tuple(target for target, limit in limits.items() if goodputs[target].estimate.mean > limit)


def _gains(lines: Sequence[Line]) -> list[Gain]:
    found = []
    rows: dict[Row, dict[str, Line]] = {}
    for line in lines:
        rows.setdefault(line.entry.row, {})[line.entry.name] = line
    for row, by_name in rows.items():
        pairs: dict[str, tuple[str, ...]] = {name: rivals for name, rivals in RIVALS.items() if name in by_name}
        if row.section is Section.ABLATION:
            whole = next(iter(by_name))
            pairs = {name: (whole,) for name in by_name if name != whole}
        for name, rivals in pairs.items():
            for target in (MAIN, EVERY_TIER):
                best = _best([by_name[rival] for rival in rivals if rival in by_name], target)
                if best is not None:
                    gain = ratio(by_name[name].goodputs[target], best.goodputs[target])
                    found.append(Gain(row, name, best.entry.name, target, gain))
    return found


def _best(lines: Sequence[Line], target: Target) -> Line | None:
    """Who has the highest goodput; a target that was reached beats one that was not."""
    return max(
        lines,
        key=lambda line: (
            line.goodputs[target].bound is not Bound.AT_MOST,
            line.goodputs[target].estimate.mean,
        ),
        default=None,
    )


def _trial_lines(entry: Entry, plan: Trial, known: Known) -> list[TrialLine]:
    subject = plan.subject(known)
    assert subject is not None, "the entry is finished"
    found = []
    for part in plan.parts:
        outcomes = plan.outcomes(part, known)
        found.append(
            TrialLine(
                entry,
                subject.contender.label,
                tuple(subject.cell(part, seed, plan.length) for seed in plan.seeds),
                part,
                part * subject.reference_rps,
                attainment(MAIN, outcomes),
                attainment(EVERY_TIER, outcomes),
                _by_tier(outcomes),
            )
        )
    return found


def _by_tier(outcomes: Sequence[CellOutcome]) -> tuple[tuple[str, Interval], ...]:
    return tuple(
        (
            tier.tier,
            t_interval([outcome.tiers[place].attainment or 0.0 for outcome in outcomes]),
        )
        for place, tier in enumerate(outcomes[0].tiers)
    )


def runs_of(found: Results, known: Known) -> dict[Cell, CellOutcome]:
    """The cells that the lines rest on, PolyServe's first; not those of sweeps and confirmations."""
    shown: dict[Cell, CellOutcome] = {}
    for line in sorted(found.lines, key=lambda line: line.entry.name not in RIVALS):
        search = line.search
        for part in search.parts(known):
            for seed in search.settings.seeds:
                cell = search.subject.cell(part, seed, search.settings.length)
                shown[cell] = known[cell]
    for trial in sorted(found.trials, key=lambda trial: trial.entry.name not in RIVALS):
        shown.update((cell, known[cell]) for cell in trial.cells)
    return shown
