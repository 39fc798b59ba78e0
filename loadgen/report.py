"""A load's result as a table, as JSON and as figures."""

from __future__ import annotations

from dataclasses import dataclass

import orjson
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadgen.results import LoadResult, RequestResult, predictions, refusals
from loadgen.search import Goodput
from scheduling.scoring import PredictionScore, Score, TierScore, judge


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:,.0f}"


def _fine_ms(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:,.1f}"


def score_table(score: Score, title: str | None = None) -> RenderableType:
    """Attainment, refusals and latencies per tier and overall: two tables, each for 80 columns."""
    kept = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    paces = Table(title="milliseconds", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for table in (kept, paces):
        table.add_column("tier")
    for heading in ("offered", "attained", "attain-\nment", "one-\nbased", "refused", "failed", "good\ntok/s"):
        kept.add_column(heading, justify="right")
    for heading in ("TTFT\np50", "\np90", "\np99", "TPOT\np50", "\np90", "\np99", "slack\np1", "\np50"):
        paces.add_column(heading, justify="right")
    for item in score.tiers:
        kept.add_row(*_kept(item))
        paces.add_row(*_paces(item))
    for table in (kept, paces):
        table.add_section()
    kept.add_row(*_kept(score.overall), style="bold")
    paces.add_row(*_paces(score.overall), style="bold")
    return Group(kept, paces)


def _kept(item: TierScore) -> list[str]:
    return [
        item.tier,
        f"{item.offered:,}",
        f"{item.attained:,}" if item.promised or not item.offered else "no promise",
        _percent(item.attainment),
        _percent(item.attainment_one_based),
        f"{item.refused:,}",
        f"{item.failed + item.unfinished:,}",
        f"{item.goodput_tokens_per_s:,.0f}" if item.promised else "-",
    ]


def _paces(item: TierScore) -> list[str]:
    return [
        item.tier,
        _ms(item.ttft_s.p50),
        _ms(item.ttft_s.p90),
        _ms(item.ttft_s.p99),
        _fine_ms(item.tpot_s.p50),
        _fine_ms(item.tpot_s.p90),
        _fine_ms(item.tpot_s.p99),
        _ms(item.slack_s.p1),
        _ms(item.slack_s.p50),
    ]


def report(result: LoadResult, score: Score, title: str | None = None) -> RenderableType:
    """Everything a person wants to see of one load."""
    parts: list[RenderableType] = [score_table(score, title)]
    if any(item.answer.emulated for item in result.measured):
        parts.append(Text("The engines behind these numbers were EMULATED: no model ran."))
    reasons = refusals(result.measured)
    if reasons:
        parts.append(Text("refused or failed: " + ", ".join(f"{why} {count:,}" for why, count in reasons.items())))
    forecast = predictions(result.measured)
    for name, item in (("TTFT", forecast.ttft), ("TPOT", forecast.tpot)):
        if item.count:
            parts.append(Text(f"{name} prediction error: {_prediction(item)}"))
    parts.append(Text(timekeeping_line(result)))
    estimated = sum(item.counts_estimated for item in result.measured)
    if estimated:
        parts.append(
            Text(f"{estimated:,} answers had more tokens than events; theirs were spread over the events")
        )
    return Group(*parts)


def _prediction(item: PredictionScore) -> str:
    return f"p50 {_percent(item.p50)}, p90 {_percent(item.p90)}, bias {_percent(item.bias)} over {item.count:,}"


def timekeeping_line(result: LoadResult) -> str:
    """How well the generator kept time, in one line."""
    clock = result.timekeeping
    cpu_us = 1e6 * result.cpu_s / result.events if result.events else 0.0
    return (
        f"generator lateness p50 {_fine_ms(clock.lateness_p50_s)} ms, p99 {_fine_ms(clock.lateness_p99_s)} ms, "
        f"max {_fine_ms(clock.lateness_max_s)} ms; event-loop lag p99 {_fine_ms(clock.loop_lag_p99_s)} ms, "
        f"max {_fine_ms(clock.loop_lag_max_s)} ms; {cpu_us:.0f} us CPU per event; "
        f"at most {result.peak_in_flight:,} requests open"
    )


def to_json(result: LoadResult, score: Score, settings: object, goodput: Goodput | None = None) -> bytes:
    """The whole result: settings, score, timekeeping and one line of numbers for every measured request."""
    return orjson.dumps(
        {
            "settings": settings,
            "emulated": any(item.answer.emulated for item in result.measured),
            "attainment": score.attainment,
            "score": score,
            "refusals": refusals(result.measured),
            "predictions": predictions(result.measured),
            "timekeeping": result.timekeeping,
            "wall_s": result.wall_s,
            "cpu_s": result.cpu_s,
            "events": result.events,
            "peak_in_flight": result.peak_in_flight,
            "goodput": goodput,
            "requests": [RequestRow.of(item) for item in result.measured],
        },
        option=orjson.OPT_INDENT_2,
    )


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request in the JSON file: what it asked for and what it got."""

    index: int
    arrival_s: float
    tier: str
    prompt_tokens: int
    output_tokens: int
    end: str
    reason: str | None
    attained: bool
    ttft_s: float | None
    tpot_s: float | None
    slack_s: float | None
    lateness_s: float
    backend: str | None
    granted_tier: str | None
    decision: str | None
    queue_s: float | None

    @classmethod
    def of(cls, result: RequestResult) -> RequestRow:
        record, answer = result.record, result.answer
        judged = judge(record)
        return cls(
            index=result.planned.index,
            arrival_s=record.arrival_s,
            tier=record.tier,
            prompt_tokens=record.prompt_tokens,
            output_tokens=judged.output_tokens,
            end=record.end.value,
            reason=record.reason,
            attained=judged.attained,
            ttft_s=judged.ttft_s,
            tpot_s=judged.tpot_s,
            slack_s=judged.slack_s,
            lateness_s=result.lateness_s,
            backend=answer.backend,
            granted_tier=answer.tier,
            decision=answer.decision,
            queue_s=answer.queue_s,
        )
