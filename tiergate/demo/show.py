"""The demo's tables: the fleet while it serves, and the policies beside each other at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tiergate.demo.outcome import RunOutcome, Spread
from tiergate.demo.sizes import Size

_BAR_CELLS = 20
_LATE_S = 0.02  # more lateness than this would show in the tightest pace


class LiveView:
    """A table of the first seed's fleet, twice a second; plain lines where there is no terminal."""

    def __init__(self, size: Size, console: Console) -> None:
        self._size = size
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False)

    def show(self, policy: str, seed: int, state: Mapping[str, object]) -> None:
        """The fleet behind one gateway, as `GET /admin/v1/state` tells it."""
        if self._console.is_terminal:
            self._live.update(fleet_view(self._size, policy, seed, state), refresh=True)

    def finished(self, outcomes: Sequence[RunOutcome]) -> None:
        """Runs ended; one line each."""
        for one in outcomes:
            self.say(f"  {one.policy:<12} seed {one.seed}: attainment {_percent(one.attainment)}")


def fleet_view(size: Size, policy: str, seed: int, state: Mapping[str, object]) -> RenderableType:
    """Backends by tier and load, attainment by tier, and what waits."""
    requests = _mapping(state.get("requests"))
    decisions = _mapping(state.get("decisions"))
    head = Text.assemble(
        (f"{policy}, seed {seed}", "bold"),
        f"   running {requests.get('running', 0)}   held {requests.get('held', 0)}"
        f"   promoted {decisions.get('promoted', 0)}   refused {requests.get('refused', 0)}"
        f"   tokens {requests.get('output_tokens', 0):,}",
    )
    note = "" if size.engine != "emulated" else "the engines are EMULATED: no model runs"
    return Group(head, _backends(size, state), _tiers(state), Text(note, style="dim"))


def _backends(size: Size, state: Mapping[str, object]) -> Table:
    table = Table(title="backends, by tier and load", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("tier", "backend", "load", "running", "promoted"):
        table.add_column(heading, justify="left" if heading in {"tier", "backend", "load"} else "right")
    ranks = {tier.name: rank for rank, tier in enumerate(size.tiers)}
    rows = [_mapping(row) for row in _rows(state, "backends")]
    rows.sort(key=lambda row: (ranks.get(str(row.get("tier")), len(ranks)), -_float(row.get("load"))))
    for row in rows:
        load = _float(row.get("load"))
        table.add_row(
            str(row.get("tier") or "(pool)"),
            str(row.get("name")),
            f"{_bar(load)} {load:4.2f}",
            str(row.get("running", 0)),
            str(row.get("promoted", 0)),
        )
    return table


def _tiers(state: Mapping[str, object]) -> Table:
    table = Table(title="tiers", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tier")
    for heading in ("TTFT/TPOT ms", "ended", "attainment", "held", "TPOT p50 ms"):
        table.add_column(heading, justify="right")
    for row in map(_mapping, _rows(state, "tiers")):
        tpot = row.get("tpot_p50_s")
        table.add_row(
            str(row.get("name")),
            f"{_float(row.get('ttft_ms')):.0f}/{_float(row.get('tpot_ms')):.0f}",
            str(row.get("offered", 0)),
            _percent(_float(row["attainment"]) if row.get("attainment") is not None else None),
            str(row.get("held", 0)),
            f"{1e3 * tpot:.1f}" if isinstance(tpot, float) else "-",
        )
    return table


def _bar(load: float) -> str:
    full = min(max(round(load * _BAR_CELLS), 0), _BAR_CELLS)
    return "█" * full + "·" * (_BAR_CELLS - full)


def comparison(size: Size, outcomes: Sequence[RunOutcome]) -> RenderableType:
    """Every policy over its seeds: attainment offered, per tier, and what it cost and predicted."""
    seeds = ", ".join(str(seed) for seed in sorted({outcome.seed for outcome in outcomes}))
    attained = Table(
        title=f"every token on time, % (tiers: TTFT/TPOT in ms); {size.backends} {size.engine} engines\n"
        f"seeds {seeds}: mean (lowest-highest)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    attained.add_column("policy")
    attained.add_column("all tiers", justify="right")
    for tier in size.tiers:
        attained.add_column(f"{tier.name}\n{tier.ttft_ms:g}/{tier.tpot_ms:g}", justify="right")
    used = Table(title="cost and predictions", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    used.add_column("policy")
    for heading in ("backend-\nseconds", "refused", "tokens/s", "TTFT error\np50/p90", "TPOT error\np50/p90"):
        used.add_column(heading, justify="right")
    for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.policy == policy]
        attained.add_row(policy, *_attained(size, runs))
        used.add_row(policy, *_used(runs))
    lines = [Text(_kept_time(outcomes))]
    if size.engine == "emulated":
        lines.append(Text(f"Engines EMULATED from profile {size.profile}: step times are measured, no model ran."))
    return Group(attained, used, *lines)


def _attained(size: Size, runs: Sequence[RunOutcome]) -> list[str]:
    tiers = []
    for tier in size.tiers:
        found = [run.tier_attainment(tier.name) for run in runs]
        tiers.append(_spread([value for value in found if value is not None]))
    return [_spread([run.attainment for run in runs]), *tiers]


def _used(runs: Sequence[RunOutcome]) -> list[str]:
    predicted = [run.bench.predictions for run in runs]
    tokens_per_s = [
        sum(tier.output_tokens for tier in run.bench.score.tiers) / run.bench.score.measured_s for run in runs
    ]
    return [
        f"{sum(run.backend_seconds for run in runs) / len(runs):,.0f}",
        str(sum(run.bench.score.overall.refused for run in runs)),
        f"{sum(tokens_per_s) / len(tokens_per_s):,.0f}",
        _errors([(one.ttft.p50, one.ttft.p90) for one in predicted]),
        _errors([(one.tpot.p50, one.tpot.p90) for one in predicted]),
    ]


def _kept_time(outcomes: Sequence[RunOutcome]) -> str:
    late = max((outcome.bench.timekeeping.lateness_p99_s or 0.0) for outcome in outcomes)
    lag = max((outcome.bench.timekeeping.loop_lag_p99_s or 0.0) for outcome in outcomes)
    gateway = max((outcome.gateway_lag_s or 0.0) for outcome in outcomes)
    verdict = (
        "small against the paces promised" if late < 0.02 and lag < 0.02 else "TOO LATE: the machine was measured"
    )
    return (
        f"load generators: lateness p99 at most {1e3 * late:.1f} ms, event-loop lag p99 at most "
        f"{1e3 * lag:.1f} ms ({verdict}); gateway event-loop lag at most {1e3 * gateway:.1f} ms"
    )


def _spread(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    if spread is None:
        return "-"
    if spread.high - spread.low < 5e-4:
        return f"{100 * spread.mean:.1f}"
    return f"{100 * spread.mean:.1f} ({100 * spread.low:.0f}-{100 * spread.high:.0f})"


def _errors(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    p50 = Spread.of([pair[0] for pair in pairs if pair[0] is not None])
    p90 = Spread.of([pair[1] for pair in pairs if pair[1] is not None])
    return "-" if p50 is None or p90 is None else f"{100 * p50.mean:.0f} %/{100 * p90.mean:.0f} %"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _rows(state: Mapping[str, object], key: str) -> list[object]:
    value = state.get(key)
    return value if isinstance(value, list) else []


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
