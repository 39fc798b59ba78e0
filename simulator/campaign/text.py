"""What a campaign found, as plain text tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.campaign.curve import Bound
from simulator.campaign.goodput import EVERY_TIER, MAIN, TARGETS, Goodput, Ratio, Target
from simulator.campaign.interval import Interval
from simulator.campaign.results import Confirmed, Gain, Line, Results, TrialLine
from simulator.campaign.table import Section
from simulator.report.formats import tier_label

_SIGNS = {Bound.EXACT: "", Bound.AT_LEAST: ">= ", Bound.AT_MOST: "<= ", Bound.UNKNOWN: "? "}
_TITLES = {
    Section.MAIN: "Goodput by trace (simulated; H200, Llama-3.1-8B)",
    Section.T0: "Other fixed step times (simulated; azure2023_conv)",
    Section.SLOW: "A slow engine (simulated; RTX PRO 6000, Qwen3-32B, promises scaled)",
    Section.BURST: "Mix inverted in mid-run (simulated)",
    Section.FLEET: "Fleet size (simulated; azure2023_conv)",
    Section.ABLATION: "PolyServe with one thing changed (simulated; azure2023_conv)",
}


def report_text(found: Results) -> str:
    """All tables. Intervals are 95 %, over seeds."""
    parts = [part for section in Section for part in _section(section, found)]
    if found.unfinished:
        names = ", ".join(f"{entry.row.name}/{entry.name}" for entry in found.unfinished)
        parts.append(f"Not finished, because cells failed: {names}\n")
    return "\n".join(parts)


def _section(section: Section, found: Results) -> Iterator[str]:
    lines = found.of(section)
    trials = [trial for trial in found.trials if trial.entry.row.section is section]
    gains = [gain for gain in found.gains if gain.row.section is section]
    if not lines and not trials:
        return
    yield f"== {_TITLES[section]} ==\n"
    for row in dict.fromkeys(line.entry.row for line in lines):
        own = [line for line in lines if line.entry.row == row]
        scale = own[0].entry.scale
        yield (
            f"{row.title}, {row.fleet.backends} instances: tier-packed reference {scale.optimal_rps:.1f} "
            f"requests/s co-located, {scale.optimal_pd_rps:.1f} disaggregated; "
            f"one pool at the tightest pace {scale.pool_rps:.1f}"
        )
        yield table_text(_HEAD, [_cells(line, row.fleet.backends) for line in own])
        of_row = [gain for gain in gains if gain.row == row]
        if of_row:
            yield "\n".join(_gain(gain) for gain in of_row) + "\n"
        yield from (f"ABOVE THE LONG-RUN BOUND: {line.label} {target.label}" for line, target in _above(own))
    if trials:
        yield table_text(_trial_head(trials), [_trial_cells(trial) for trial in trials])


_HEAD = (
    "contender",
    *(target.label for target in TARGETS),
    "of optimal",
    "per server",
    "rates",
    "confirmed",
)


def _cells(line: Line, backends: int) -> tuple[str, ...]:
    main = line.main
    return (
        line.label if line.entry.row.section is not Section.ABLATION else line.entry.name,
        *(_goodput(line.goodputs[target]) for target in TARGETS),
        _SIGNS[main.bound] + with_half(line.of_optimal, 3),
        f"{_SIGNS[main.bound]}{main.estimate.mean / backends:.2f}",
        f"{line.rates} guided" if line.guided else str(line.rates),
        _confirmed(line.confirmed),
    )


def _goodput(goodput: Goodput) -> str:
    return _SIGNS[goodput.bound] + with_half(goodput.estimate, 1)


def _confirmed(confirmed: Confirmed | None) -> str:
    if confirmed is None:
        return "-"
    return f"{confirmed.overall.mean:.1%} ({confirmed.every_tier.mean:.1%} worst tier) at {confirmed.rate_rps:.1f}"


def _gain(gain: Gain) -> str:
    return f"  {gain.name} / {gain.against}, {gain.target.label}: {_ratio(gain.ratio)}"


def _ratio(ratio: Ratio) -> str:
    estimate = ratio.estimate
    text = f"{_SIGNS[ratio.bound]}{estimate.mean:.3f}x"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _above(lines: Sequence[Line]) -> Iterator[tuple[Line, Target]]:
    for line in lines:
        for target in line.above_ceiling:
            yield line, target


def _trial_head(trials: Sequence[TrialLine]) -> tuple[str, ...]:
    paces = {tier.name: tier.slo.tpot_s for tier in trials[0].entry.row.workload.tiers}
    names = [tier_label(name, paces.get(name)) for name, _ in trials[0].tiers]
    return ("contender", "rate", "of reference", MAIN.judged.value, EVERY_TIER.judged.value, *names)


def _trial_cells(trial: TrialLine) -> tuple[str, ...]:
    shares = (trial.overall, trial.every_tier, *(share for _, share in trial.tiers))
    return (trial.label, f"{trial.rate_rps:.1f}", f"{trial.part:.0%}", *map(percent, shares))


def percent(share: Interval) -> str:
    """`93.4±0.6`, in per cent."""
    half = "" if share.half is None else f"±{100 * share.half:.1f}"
    return f"{100 * share.mean:.1f}{half}"


def with_half(value: Interval, decimals: int) -> str:
    """`12.3±0.4`."""
    half = "" if value.half is None else f"±{value.half:.{decimals}f}"
    return f"{value.mean:.{decimals}f}{half}"


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their content, the first to the left, all others to the right."""
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    ruled = (head, ["-" * width for width in widths], *rows)
    lines = (
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in ruled
    )
    return "\n".join(line.rstrip() for line in lines) + "\n"
