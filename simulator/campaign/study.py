"""A campaign's results as a report's study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from simulator.build import kinds_of
from simulator.campaign.curve import Bound
from simulator.campaign.goodput import MAIN, Judged
from simulator.campaign.results import Gain, Line, Results
from simulator.campaign.scale import ceilings_of
from simulator.campaign.table import AZURE, RIVALS, Section
from simulator.outcome import CellOutcome
from simulator.reference import fixed_s
from simulator.report.formats import bounded
from simulator.report.gradient import telling_runs
from simulator.report.summary import compare, profile_notes
from simulator.report.values import AblationRow, GainRow, GoodputRow, Mark, MarkKind, Run, Setting, Study
from simulator.scenario import Cell, Form


def with_samples(study: Study, samples: Callable[[Cell], CellOutcome | None]) -> Study:
    """The study with the samples of the runs that are drawn; campaigns keep them in their store only."""
    told = {run.cell for comparison in compare(study.runs) for run in telling_runs(comparison)}
    runs = []
    for run in study.runs:
        outcome = samples(run.cell) if run.cell in told else None
        runs.append(run if outcome is None else Run(run.cell, outcome))
    return replace(study, runs=tuple(runs))


def study_of(found: Results, runs: Iterable[Run], *, title: str, rerun: str) -> Study:
    """What the report shows: all goodputs and ratios, and the runs given.

    Raises ProfileError when a profile cannot be read.
    """
    kept = tuple(runs)
    others = [gain for gain in found.gains if gain.row.section is not Section.ABLATION]
    return Study(
        title,
        kept,
        findings=tuple(_findings(found)),
        marks=tuple(_marks(found)),
        goodputs=tuple(_goodputs(found)),
        gains=tuple(_gain_row(gain) for gain in others),
        ablations=tuple(
            AblationRow(gain.row.title, gain.name, gain.target, gain.ratio)
            for gain in found.gains
            if gain.row.section is Section.ABLATION
        ),
        profiles=profile_notes(kept),
        rerun=rerun,
    )


def _setting(line: Line) -> Setting:
    return Setting.of(line.search.subject.cell(1.0, 1, line.search.settings.length))


def _goodputs(found: Results) -> Iterator[GoodputRow]:
    for line in found.lines:
        reference_rps = line.entry.scale.optimal(line.entry.form)
        for goodput in line.goodputs.values():
            yield GoodputRow(_setting(line), line.label, goodput, reference_rps)


def _gain_row(gain: Gain) -> GainRow:
    """Rows that differ in t0 only get one group and one rival, so that they make a curve."""
    floor_s = gain.row.fleet.engines[0].step_floor_s
    plain = gain.row.section is Section.MAIN and gain.row.workload == AZURE
    if floor_s is None and not plain:
        group = gain.row.title if gain.row.section is Section.MAIN else f"{gain.row.section}: {gain.row.title}"
        return GainRow(group, gain.name, gain.against, gain.target, gain.ratio)
    t0_s = fixed_s(kinds_of(gain.row.fleet)[0].step_time) if floor_s is None else floor_s
    rivals = f"the best of {', '.join(RIVALS[gain.name])}"
    return GainRow(gain.row.workload.trace, gain.name, rivals, gain.target, gain.ratio, t0_s)


def _marks(found: Results) -> Iterator[Mark]:
    """The co-located reference and bounds of every setting."""
    for setting, line in {_setting(line): line for line in found.lines}.items():
        ceilings = ceilings_of(setting.workload, setting.fleet, Form.COLOCATED)
        yield Mark(setting, MarkKind.REFERENCE, "tier-packed reference", line.entry.scale.optimal_rps)
        yield Mark(setting, MarkKind.UPPER, "bound: all on time", ceilings.all_rps)
        yield Mark(setting, MarkKind.UPPER, "bound: dearest tenth dropped", ceilings.most_rps, Judged.OVERALL)
        yield Mark(
            setting,
            MarkKind.UPPER,
            "bound: dearest tenth of each tier dropped",
            ceilings.every_tier_rps,
            Judged.EVERY_TIER,
        )


def _findings(found: Results) -> Iterator[str]:
    for gain in found.gains:
        if gain.row.section is Section.MAIN and gain.target == MAIN and gain.ratio.bound is Bound.EXACT:
            yield (
                f"{gain.row.title}: {gain.name} serves {bounded(gain.ratio.estimate, gain.ratio.bound, 3)} times "
                f"the goodput of {gain.against} at {gain.target.label}."
            )
    for line in found.lines:
        for target in line.above_ceiling:
            yield (
                f"{line.entry.row.name}: {line.label} is above what can be kept up for long at {target.label}: by "
                "little, its window flattered it; by more, there is a bug."
            )
    for entry in found.unfinished:
        yield f"{entry.row.name}: {entry.name} is missing, because cells of it failed."
