"""What `tiergate simulate plan` prints: tables for 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles.catalogue import load
from simulator.planning.costs import Saving
from simulator.planning.result import CapacityPlan, Level, PlannedWindow, Priced
from simulator.planning.sizing import ALL
from simulator.report import formats

_MOST_TIERS = 4  # beside each other in one table
_TINY = 0.5  # of a backend
_NAME = 8  # letters of a tier's name in a heading
LIMITS = (
    "Every number is simulated: engines are a model whose step times come from the profile. The network, failures "
    "and hits of prefix caches are not modelled; a backend that is added serves at once unless --startup-s says "
    "otherwise. Loads are steady inside a window, and a fleet is judged under the lengths of all windows of its "
    "group. A tier without a promise asks for no backends: "
    "it takes what is left."
)


def clock(start_s: float, window_s: float) -> str:
    """`09:15`, with the day before it after the first, `2+09:15`, and with seconds where windows are short."""
    days, rest = divmod(round(start_s), 86_400)
    told = f"{f'{days}+' if days else ''}{rest // 3600:02}:{rest // 60 % 60:02}"
    return told if window_s % 60 == 0 else f"{told}:{rest % 60:02}"


def title(plan: CapacityPlan) -> str:
    """What was planned, in a line."""
    (engines,) = plan.asked.fleet.engines
    return f"{plan.asked.demand.trace.name} on {engines.profile}, {plan.asked.contender.label}"


def conditions(plan: CapacityPlan) -> tuple[str, ...]:
    """Under what it was planned, in sentences."""
    asked = plan.asked
    trace = asked.demand.trace
    own = "each request keeps its tier from the log" if asked.demand.own_tiers else "tiers drawn by share"
    lines = [
        (
            f"{len(trace.requests):,} requests in {_span(trace.duration_s)}, played at {asked.rate_factor:g} x "
            f"their rate; {_windows(len(plan.windows))} of {_span(plan.window_s)}; {own}."
        ),
        (
            f"Target: {100 * asked.target:g} % of all requests and of every tier's are on time to their last "
            f"token, over {_seeds(asked.seeds)}. Arrivals in a window: {asked.arrivals.value}."
        ),
        _profile_line(plan),
    ]
    if asked.default_profile:
        lines.append(
            f"No --profile was given: {asked.fleet.engines[0].profile} is the default, whatever engine the trace "
            "was recorded on. Name yours with --profile."
        )
    if trace.guessed:
        lines.append(f"{trace.guessed:,} requests that the log saw refused or lost count with another's length.")
    return tuple(line for line in lines if line)


def _windows(count: int) -> str:
    return f"{count} {'window' if count == 1 else 'windows'}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


def _profile_line(plan: CapacityPlan) -> str:
    (engines,) = plan.asked.fleet.engines
    profile = load(engines.profile)
    regimes, error = profile.file.regimes, profile.p90_error
    told = "not known" if error is None else f"{100 * error:.2g} % (p90, cross-validated)"
    return (
        f"Step times of {profile.file.model} on {profile.file.hardware}: decode {regimes.decode.source.value}, "
        f"with prefill {regimes.mixed.source.value}; error of a step {told}."
    )


def warnings(plan: CapacityPlan) -> tuple[str, ...]:
    """What no number of backends can mend, and loads for which no fleet was found."""
    asked, lines = plan.asked, []
    impossible = [each for each in asked.demand.impossible if each.share > 0]
    if impossible:
        told = ", ".join(f"{_percent(each.share)} of {each.tier}" for each in impossible)
        over = [each.tier for each in impossible if each.share > 1 - asked.target]
        verdict = f" The target is out of reach for {', '.join(over)}." if over else ""
        lines.append(
            f"even an idle engine misses the promise of {told}: no number of backends helps, so they are left "
            f"out.{verdict}"
        )
    for name, value in plan.unloaded:
        what = "all tiers together" if name == ALL else name
        target = _percent(asked.target)
        lines.append(
            f"{what}: {asked.contender.label} attains {_percent(value)} even on a fleet without load, so no "
            f"number of backends reaches {target}. The plan does not count these misses."
        )
    failed = [one for one in plan.windows if one.backends is None]
    if failed:
        most = max(backends for level in plan.levels if level.backends is None for backends, *_ in level.tried)
        lines.append(
            f"{_windows(len(failed))}: the target was not reached with up to {most} backends. Loosen a tier, "
            f"lower --target, or try another --policy.{_nearest(plan)}"
        )
    load = max((one.window.load for one in plan.windows), default=0.0)
    if plan.peak == 1 and 0 < load < _TINY:
        lines.append(
            f"one backend serves every window, and the busiest needs only {load:.2g} of one: the trace is small "
            f"for this engine. --rate-factor {math.ceil(4 / load):,} would ask for about four backends."
        )
    return tuple(lines)


def _nearest(plan: CapacityPlan) -> str:
    """How near the largest fleet came where none keeps the target."""
    level = next((one for one in plan.levels if one.backends is None and one.over is not None), None)
    if level is None or level.over is None:
        return ""
    borderline = ", short by less than the interval over seeds" if _mark(plan, level) else ""
    return f" The worst tier came to {_percent(level.over.mean)}{borderline}."


def answer(plan: CapacityPlan, price: float | None) -> RenderableType:
    """Everything a person wants to see."""
    parts: list[RenderableType] = [Text(f"SIMULATED, no engine ran: {title(plan)}")]
    parts += [Text(line) for line in conditions(plan)]
    parts += [Text(f"Note: {line}", style="bold") for line in warnings(plan)]
    parts += [Text(""), *_day(plan), _simulated(plan)]
    parts += [Text(line) for line in totals(plan, price)]
    if plan.priced is not None and plan.priced.savings:
        parts += [Text(""), _costs(plan, plan.priced, price)]
    parts += [Text(""), Text(LIMITS)]
    return Group(*parts)


def _table(heading: str, columns: Sequence[str]) -> Table:
    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def held_names(plan: CapacityPlan) -> tuple[str, ...]:
    """The tiers that held backends at any time; none for a policy without tiers."""
    held = {name for level in plan.levels for name, _ in level.held.tiers}
    own = (tier.name for tier in plan.asked.demand.tiers)
    return tuple(name for name in dict.fromkeys([*own, *sorted(held)]) if name in held)


def _day(plan: CapacityPlan) -> list[RenderableType]:
    names = held_names(plan)
    groups = [names[start : start + _MOST_TIERS] for start in range(0, len(names), _MOST_TIERS)] or [()]
    runs = _folded(plan.windows)
    parts: list[RenderableType] = []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        heads = [name[:_NAME] for name in group]
        table = _table(
            "Backends since the start of the trace" if number == 0 else "",
            ["from", "req/s", "ideal", "fleet", *heads, *(["pool", "worst"] if last else [])],
        )
        for run in runs:
            one = max(run, key=lambda each: each.window.load)
            own = tenths(one)
            cells = [formats.NOTHING if not one.backends else own.get(name, "0.0") for name in group]
            ends = [own.get(_POOL, "0.0") if names else "shared", _worst(plan, one)] if last else []
            table.add_row(clock(run[0].window.start_s, plan.window_s), *_window(one), *cells, *ends)
        parts.append(table)
    lines = "1 line" if len(runs) == 1 else f"{len(runs)} lines"
    folded = (
        f" {_windows(len(plan.windows))} in {lines}: neighbours with the same fleet are one, with their "
        "greatest req/s."
        if len(runs) < len(plan.windows)
        else ""
    )
    parts.append(Text(DAY_SAYS + (f" {SCALED_SAYS}" if any(one.scaled for one in plan.windows) else "") + folded))
    return parts


_POOL = "pool"
DAY_SAYS = (
    "ideal: backends if packing were perfect (the tier-packed reference). fleet: backends planned; ~: borderline, "
    "one fewer misses the target by less than the interval over seeds. Then by tier those it held, and pool: "
    "those that no tier held, mean over time at the greatest load that the fleet serves. A pool that is not empty "
    "on average is there for bursts: without it they miss. worst: attainment in % of the tier that fares worst, "
    "there."
)
SCALED_SAYS = "*: beyond the greatest simulated load, in proportion."
FORGIVEN_SAYS = (
    "f: below the target, but the misses beyond it are those that a fleet without load has too; they are forgiven."
)


def _folded(windows: Sequence[PlannedWindow]) -> list[list[PlannedWindow]]:
    """Neighbours whose fleets are alike in everything, together."""
    runs: list[list[PlannedWindow]] = []
    for one in windows:
        last = runs[-1][-1] if runs else None
        if last is not None and _told(last) == _told(one):
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def _told(one: PlannedWindow) -> tuple[int | None, int | None, bool, bool]:
    return one.backends, one.level, one.scaled, one.borderline


def tenths(one: PlannedWindow) -> dict[str, str]:
    """Backends by tier and of the pool, rounded so that they add up to the fleet (largest remainders)."""
    values = [*one.held.tiers, (_POOL, one.held.pool)]
    whole = round(10 * math.fsum(value for _, value in values))
    floors = {name: int(10 * value + 1e-9) for name, value in values}
    rest = sorted(values, key=lambda item: floors[item[0]] - 10 * item[1])
    for name, _ in rest[: max(whole - sum(floors.values()), 0)]:
        floors[name] += 1
    return {name: f"{tenth / 10:.1f}" for name, tenth in floors.items()}


def _window(one: PlannedWindow) -> tuple[str, ...]:
    return f"{one.window.rate_rps:.3g}", f"{one.window.load:.2f}", fleet_cell(one)


def fleet_cell(one: PlannedWindow) -> str:
    """The number with its marks."""
    if one.backends is None:
        return "none"
    return f"{one.backends}{'*' if one.scaled else ''}{'~' if one.borderline else ''}"


def _worst(plan: CapacityPlan, one: PlannedWindow) -> str:
    if one.level is None:
        return formats.NOTHING
    level = plan.levels[one.level]
    return attained(plan, min((value for name, value in level.attainments if name != ALL), default=1.0), level)


def attained(plan: CapacityPlan, value: float | None, level: Level) -> str:
    """In percent; `f` where it is below the target and the level keeps it all the same."""
    if value is None:
        return formats.NOTHING
    forgiven = level.backends is not None and value < plan.asked.target
    return f"{100 * value:.1f}{'f' if forgiven else ''}"


def _simulated(plan: CapacityPlan) -> RenderableType:
    promised = plan.asked.demand.promised[:_MOST_TIERS]
    table = _table(
        "What each fleet serves: attainment in %, all seeds together",
        ["fleet", "req/s", "all", *(name[:_NAME] for name in promised), "seeds", "not", "worst"],
    )
    for level in plan.levels:
        own = dict(level.attainments)
        table.add_row(
            "none" if level.backends is None else str(level.backends),
            f"{level.rate_rps:.4g}",
            attained(plan, own.get(ALL), level),
            *(attained(plan, own.get(name), level) for name in promised),
            f"{level.seeds_reached}/{level.worst.count}",
            formats.NOTHING if level.over_rps is None else f"{level.over_rps:.4g}",
            formats.NOTHING if level.over is None else f"{100 * level.over.mean:.1f}{_mark(plan, level)}",
        )
    return Group(table, Text(" ".join([LEVELS_SAY, *([FORGIVEN_SAYS] if plan.unloaded else [])])))


LEVELS_SAY = (
    "req/s: the greatest of the windows' rates that the fleet serves, then what it attains there. seeds: how many "
    "keep the target alone. not: the least rate tried that it does not serve, and what the worst tier attains "
    "there (~: short of the target by less than the interval over seeds). Rates within 3 % of each other count as "
    "the greater. Rates here are of requests of mean cost; a window of dearer ones counts as more (see ideal)."
)


def _mark(plan: CapacityPlan, level: Level) -> str:
    over = level.over
    near = over is not None and over.half is not None and over.mean + over.half >= plan.asked.target
    return "~" if near else ""


def totals(plan: CapacityPlan, price: float | None) -> tuple[str, ...]:
    """Peak, mean, backend-hours, and what a static fleet or silos would take."""
    peak, hours = plan.peak, plan.backend_hours
    if peak is None or hours is None:
        return ()
    whole = plan.hours

    def money(backend_hours: float) -> str:
        return "" if price is None else f", costs {backend_hours * price:,.2f}"

    lines = [
        "",
        (
            f"Peak {peak} {'backend' if peak == 1 else 'backends'}, mean {hours / whole:.2f}, "
            f"{hours:.3g} backend-hours in {_span(3600 * whole)}{money(hours)}."
        ),
        (
            f"A static fleet of the peak's size: {peak * whole:.3g} backend-hours{money(peak * whole)}"
            f"{_more(peak * whole, hours)}."
        ),
    ]
    silos = plan.silos
    if silos is not None and silos.backends is not None:
        most = silos.backends * whole
        lines.append(
            f"Silos, one pool a tier: {silos.backends}{' (borderline)' if silos.borderline else ''} backends at "
            f"the peak, static {most:.3g} backend-hours{money(most)}{_more(most, hours)}.{_against(plan, peak)}"
        )
    elif silos is not None:
        lines.append("Silos, one pool a tier, did not reach the target with any number that was tried.")
    return tuple(lines)


def _against(plan: CapacityPlan, peak: int) -> str:
    """What is to be said of silos that need fewer backends than the plan."""
    silos = plan.silos
    if silos is None or silos.backends is None or silos.backends >= peak:
        return ""
    if any(one.borderline for one in plan.windows if one.backends == peak):
        return " They need fewer than the plan's peak, but that is borderline: more --seeds would tell."
    return (
        f" They need fewer than the plan: at this load {plan.asked.contender.label} loses more by the backends it "
        "holds for tiers than it wins by sharing them. Compare --policy qoserve_silo."
    )


def _more(value: float, than: float) -> str:
    return f", {100 * (value / than - 1):+.0f} %" if than else ""


def _costs(plan: CapacityPlan, priced: Priced, price: float | None) -> RenderableType:
    columns = ["tier", "change", "backends at peak", "backend-s/1k"]
    table = _table("What each promise costs", [*columns, *(["money/1k"] if price is not None else [])])
    for one in priced.savings:
        told = saving_cells(plan, one, price)
        table.add_row(one.tier[:_NAME], change(one), *told[: 3 if price is not None else 2])
    whole_s = priced.request_cost_s.mean
    costs = f"{1e3 * whole_s:,.0f} backend-s there"
    if price is not None:
        costs += f", or {1e3 * whole_s * price / 3600:,.4f} in the unit of --price-per-hour"
    measured = (
        f"Measured on {priced.backends} backends at the greatest rate that keeps the target: 1,000 requests of "
        f"the whole mix cost {costs}."
    )
    return Group(table, Text(f"{COSTS_SAY} {measured}"))


COSTS_SAY = (
    "Saved by the change, at the peak (± half a 95 % interval over seeds) and for 1,000 requests of the tier "
    "(1k). TPOT as X: the tier's requests stay, at X's pace. traffic gone: the tier's requests are not served at "
    "all, the others as before. no measurable saving: not above its ±. The lines are not parts of a whole: each "
    "changes one tier and leaves the others, and what two tiers share (a backend, the room kept for bursts) is "
    "saved with either, so that they may add up to more than the whole fleet, or to less. bound: the target was "
    "not crossed between two rates that were tried, and the number says the least or the most."
)


def saving_cells(plan: CapacityPlan, one: Saving, price: float | None) -> tuple[str, str, str]:
    """Backends at the peak, backend-seconds and money for 1,000 requests of the tier."""
    saved = one.per_request_s
    half = "" if saved.half is None else f" ±{plan.peak_rps * saved.half:.1f}"
    if not one.measurable:
        return "no measurable saving", formats.NOTHING, formats.NOTHING
    bound = "" if one.exact else " (bound)"
    money = "" if price is None else f"{one.per_thousand_s * price / 3600:,.4f}"
    return f"{plan.peak_rps * saved.mean:.2f}{half}{bound}", f"{one.per_thousand_s:,.0f}", money


def change(saving: Saving) -> str:
    """What was changed, in words that `COSTS_SAY` explains."""
    return "traffic gone" if saving.relaxed_to is None else f"TPOT as {saving.relaxed_to}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.4g} %"


def _span(seconds: float) -> str:
    """`58 min`, `1 h 30 min`, `7 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {rest:02} min" if rest else f"{hours} h"
    return f"{hours / 24:.3g} days"
