"""`tiergate bench`: offer open-loop load to an OpenAI base URL and score every token against its deadline."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import resource
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvloop
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gateway.config import Settings, TierSettings
from loadgen.client import LoadOptions, run_load
from loadgen.client import Progress as LoadProgress
from loadgen.figures import FiguresUnavailable, draw_attainment, draw_slack, need_figures
from loadgen.prompts import TokenIdPrompts, WordPrompts
from loadgen.report import report, to_json
from loadgen.results import LoadResult, summarise
from loadgen.search import Bisection, Goodput, find_goodput
from loadgen.target import Lengths, Route, Target
from scheduling.scoring import Score
from scheduling.tiers import Slo
from tiergate.commands import CommandFailed, UsageError
from workloads.mix import TierMix, TierShare, WorkloadError, parse_mix
from workloads.plan import Window, plan, synthetic_trace
from workloads.traces import (
    Trace,
    TraceError,
    limit_lengths,
    named_trace,
    scale_rate,
    shipped,
    spread_ticks,
    time_window,
)

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

_SPARE_FILES = 64
_REPORT_COLUMNS = 160


def add_parser(subparsers: Subparsers) -> None:
    """Add `bench` and its options."""
    parser = subparsers.add_parser(
        "bench",
        help="offer open-loop load to an OpenAI base URL and score every token against its deadline",
        description="Offers open-loop load and scores every token against its deadline. Latency counts from the "
        "scheduled arrival. A tier's SLO comes from --tiers, else from the gateway's default tiers.",
    )
    _add_server(parser.add_argument_group("server"))
    _add_load(parser.add_argument_group("load"))
    _add_measurement(parser.add_argument_group("measurement"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the whole result")
    output.add_argument("--figures", type=Path, metavar="DIR", help="write figures (needs tiergate[figures])")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(func=run)


def _add_server(server: argparse._ArgumentGroup) -> None:
    server.add_argument("--url", required=True, help="OpenAI base URL, e.g. http://127.0.0.1:8080/v1")
    server.add_argument("--model", required=True)
    server.add_argument("--api-key", help="sent as a bearer token")
    server.add_argument("--route", choices=[route.value for route in Route], default=Route.CHAT.value)
    server.add_argument(
        "--lengths",
        choices=[lengths.value for lengths in Lengths],
        default=Lengths.EXACT.value,
        help="how the engine learns a length: exact (max_tokens and ignore_eos), limit (max_tokens only), "
        "emulated (the emulated engine's own argument, which the gateway does not see)",
    )
    server.add_argument("--max-tokens", type=int, help="max_tokens to send with --lengths emulated")
    server.add_argument("--no-tier-header", action="store_true", help="do not send x-slo-tier")


def _add_load(load: argparse._ArgumentGroup) -> None:
    source = load.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", help=f"a trace file, or the name of a shipped one ({', '.join(shipped())})")
    source.add_argument("--poisson", type=float, metavar="RATE", help="requests/s with random gaps")
    load.add_argument("--prompt-tokens", type=int, default=256, help="with --poisson")
    load.add_argument("--output-tokens", type=int, default=128, help="with --poisson")
    load.add_argument("--cv", type=float, default=1.0, help="burstiness of --poisson: above 1 comes in bursts")
    load.add_argument("--rate-factor", type=float, default=1.0, help="play a trace so many times as fast")
    load.add_argument(
        "--from", dest="from_s", type=float, default=0.0, help="begin so many seconds into the trace"
    )
    load.add_argument("--max-prompt-tokens", type=int, help="shorten longer prompts")
    load.add_argument("--max-output-tokens", type=int, help="shorten longer answers")
    load.add_argument("--max-requests", type=int)
    load.add_argument("--unstreamed", type=float, default=0.0, help="share of requests that do not stream")
    load.add_argument("--token-ids", type=int, metavar="VOCABULARY", help="prompts of token ids (completions)")
    load.add_argument("--words-per-token", type=float, default=1.0, help="measured ratio of a real tokenizer")
    load.add_argument("--template-tokens", type=int, help="what the chat template adds to a prompt")
    load.add_argument(
        "--tiers",
        required=True,
        help='tier mix: a YAML file, or "name=share[:ttft_ms/tpot_ms],...", e.g. "chat=0.7:2000/50,batch=0.3:-/-"',
    )


def _add_measurement(measure: argparse._ArgumentGroup) -> None:
    measure.add_argument("--duration", type=float, default=60.0, metavar="S", help="measured time")
    measure.add_argument("--warmup", type=float, default=10.0, metavar="S", help="load before it, not scored")
    measure.add_argument("--cooldown", type=float, default=0.0, metavar="S", help="load after it, not scored")
    measure.add_argument(
        "--drain", type=float, default=120.0, metavar="S", help="longest wait for the last answers"
    )
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--goodput", action="store_true", help="search the highest rate that keeps --target")
    measure.add_argument("--target", type=float, default=0.9, help="attainment to keep, 0..1")
    measure.add_argument("--runs", type=int, default=6, help="loads in the search")
    measure.add_argument("--low", type=float, default=0.25, help="lowest rate factor of the search")
    measure.add_argument("--high", type=float, default=4.0, help="highest rate factor of the search")


def run(args: argparse.Namespace) -> int:
    """Run one load, or a goodput search. Returns 1 when not one measured request finished."""
    try:
        _check(args)
        return _Bench(args).run()
    except (WorkloadError, TraceError, ValueError) as error:
        raise UsageError(str(error)) from error
    except (OSError, FiguresUnavailable) as error:
        raise CommandFailed(str(error)) from error


def _check(args: argparse.Namespace) -> None:
    """Refuse what would be ignored, or be found out only after the load. Raises WorkloadError and OSError."""
    if args.trace is None and (args.rate_factor != 1.0 or args.from_s != 0.0):
        raise WorkloadError("--rate-factor and --from are for --trace; with --poisson change the rate itself")
    if not (args.rate_factor > 0.0 and math.isfinite(args.rate_factor)):
        raise WorkloadError(f"--rate-factor must be positive, not {args.rate_factor:g}")
    if not (args.from_s >= 0.0 and math.isfinite(args.from_s)):
        raise WorkloadError(f"--from must be zero or more seconds, not {args.from_s:g}")
    if not 0.0 <= args.unstreamed <= 1.0:
        raise WorkloadError(f"--unstreamed must be a share from 0 to 1, not {args.unstreamed:g}")
    if not args.drain >= 0.0:
        raise WorkloadError(f"--drain must be zero or more seconds, not {args.drain:g}")
    for option in ("max_tokens", "max_prompt_tokens", "max_output_tokens"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise WorkloadError(f"--{option.replace('_', '-')} must be at least 1, not {value}")
    if args.json is not None and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        raise OSError(f"--json: {args.json} cannot be written")
    if args.figures is not None:
        need_figures()
        args.figures.mkdir(parents=True, exist_ok=True)


def read_mix(text: str) -> TierMix:
    """A tier mix from a YAML file (``tiers``: name, ttft_ms, tpot_ms, share) or from the text itself."""
    known = {tier.name: _slo(tier) for tier in Settings().tiers}
    path = Path(text)
    if "=" in text or not path.is_file():
        return parse_mix(text, known)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: not valid YAML: {error}") from None
    entries = loaded.get("tiers") if isinstance(loaded, dict) else None
    if not isinstance(entries, list) or not entries:
        raise WorkloadError(f"{path}: `tiers` must be a list of tiers with name, ttft_ms, tpot_ms and share")
    shares = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise WorkloadError(f"{path}: tiers.{number} must be a mapping, not {entry!r}")
        share = entry.pop("share", 1.0)
        try:
            tier = TierSettings.model_validate(entry)
        except ValidationError as error:
            detail = error.errors()[0]
            field = ".".join(map(str, (number, *detail["loc"])))
            raise WorkloadError(f"{path}: tiers.{field}: {detail['msg']}") from None
        if not isinstance(share, int | float):
            raise WorkloadError(f"{path}: tiers.{number}.share must be a number, not {share!r}")
        shares.append(TierShare(tier.name, _slo(tier), share))
    return TierMix(tuple(shares))


def _slo(tier: TierSettings) -> Slo:
    return Slo(
        None if tier.ttft_ms is None else tier.ttft_ms / 1e3, None if tier.tpot_ms is None else tier.tpot_ms / 1e3
    )


Outcome = TypeVar("Outcome")


def _uvloop(main: Coroutine[object, object, Outcome]) -> Outcome:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


@dataclass(frozen=True, slots=True)
class _Offered:
    """One load and its score."""

    result: LoadResult
    score: Score


class _Bench:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        # Where nobody looks, rich assumes 80 columns, which would cut the numbers off the table.
        self._console = Console(width=None if sys.stdout.isatty() else _REPORT_COLUMNS)
        self._mix = read_mix(args.tiers)
        self._window = Window(args.warmup, args.duration, args.cooldown)
        self._target = self._make_target()
        self._trace = self._read_trace()

    def run(self) -> int:
        args = self._args
        _raise_file_limit()
        self._warn_of_a_short_trace()
        goodput: Goodput | None = None
        if args.goodput:
            goodput, offered = self._search(Bisection(args.low, args.high, args.runs, args.target))
        else:
            offered = _uvloop(self._offer(1.0))
            self._console.print(report(offered.result, offered.score, self._title(1.0)))
        if args.json is not None:
            args.json.write_bytes(to_json(offered.result, offered.score, _settings(args), goodput))
        if args.figures is not None:
            self._draw(args.figures, offered.result, goodput)
        return 0 if any(item.finished for item in offered.score.tiers) else 1

    def _warn_of_a_short_trace(self) -> None:
        """Said beforehand, because a load that ends early has a lower rate than its trace."""
        if self._trace is None:
            return
        fastest = self._args.rate_factor * (self._args.high if self._args.goodput else 1.0)
        lasts_s = self._trace.duration_s / fastest
        if lasts_s < self._window.total_s:
            self._console.print(
                f"note: {self._trace.name} lasts only {lasts_s:,.0f} s at factor {fastest:g}, "
                f"not {self._window.total_s:g} s"
            )

    def _make_target(self) -> Target:
        args = self._args
        lengths = Lengths(args.lengths)
        template_tokens = args.template_tokens
        if template_tokens is None:
            template_tokens = 1 if lengths is Lengths.EMULATED else 0
        prompts: TokenIdPrompts | WordPrompts
        if args.token_ids is not None:
            prompts = TokenIdPrompts(args.seed, args.token_ids)
        else:
            prompts = WordPrompts(args.seed, args.words_per_token)
        return Target(
            base_url=args.url,
            model=args.model,
            prompts=prompts,
            route=Route(args.route),
            lengths=lengths,
            max_tokens=args.max_tokens,
            template_tokens=template_tokens,
            tier_header=None if args.no_tier_header else "x-slo-tier",
            api_key=args.api_key,
        )

    def _read_trace(self) -> Trace | None:
        """The trace, cut to its beginning and its lengths; None for synthetic load."""
        args = self._args
        if args.trace is None:
            return None
        trace = named_trace(args.trace)
        if len(trace.requests) > 1 and not trace.duration_s:
            raise WorkloadError(f"--trace: {trace.name} says no arrivals, or all at once; take --poisson instead")
        trace = spread_ticks(trace, random.Random(f"{args.seed}:ticks"))
        if args.from_s:
            trace = time_window(trace, args.from_s, trace.duration_s)
        return limit_lengths(trace, args.max_prompt_tokens, args.max_output_tokens)

    def _trace_at(self, factor: float) -> Trace:
        args = self._args
        if self._trace is not None:
            return scale_rate(self._trace, factor * args.rate_factor)
        return synthetic_trace(
            args.poisson * factor, self._window.total_s, args.prompt_tokens, args.output_tokens, args.seed, args.cv
        )

    def _title(self, factor: float) -> str:
        args = self._args
        rate_factor = factor * args.rate_factor
        return f"{self._trace_at(factor).name}, rate factor {rate_factor:g}, seed {args.seed}, {args.url}"

    async def _offer(self, factor: float) -> _Offered:
        args = self._args
        planned = plan(
            self._trace_at(factor),
            self._mix,
            self._window,
            args.seed,
            unstreamed_share=args.unstreamed,
            max_requests=args.max_requests,
        )
        options = LoadOptions(drain_s=args.drain)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, disable=args.quiet, transient=True) as bar:
            task = bar.add_task("starting", total=len(planned))

            def show(now: LoadProgress) -> None:
                bar.update(task, completed=now.sent, description=_standing(now))

            result = await run_load(self._target, planned, self._window.measured_s, options, show)
        return _Offered(result, summarise(result, self._mix))

    def _search(self, bisection: Bisection) -> tuple[Goodput, _Offered]:
        """Run the search; the load kept beside it is the one at the goodput, or the last one."""
        loads: dict[float, _Offered] = {}

        async def offer(factor: float) -> float:
            offered = await self._offer(factor)
            loads[factor] = offered
            self._console.print(report(offered.result, offered.score, self._title(factor)))
            attainment = offered.score.attainment
            if attainment is None:
                raise WorkloadError("no tier of the mix has a promise, so there is no attainment to keep")
            return attainment

        goodput = _uvloop(find_goodput(bisection, offer))
        self._console.print(describe(goodput, self._rate_rps(1.0)))
        best = goodput.factor if goodput.factor is not None else goodput.points[-1].factor
        return goodput, loads[best]

    def _rate_rps(self, factor: float) -> float:
        if self._trace is None:
            rate: float = self._args.poisson * factor
            return rate
        arrivals = [item.arrival_s for item in self._trace_at(factor).requests]
        return sum(map(self._window.measures, arrivals)) / self._window.measured_s

    def _draw(self, folder: Path, result: LoadResult, goodput: Goodput | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        draw_slack({"": result}, folder / "slack.png", "Token-deadline slack")
        if goodput is not None:
            draw_attainment(
                {"attainment": goodput.points},
                folder / "attainment.png",
                target=goodput.target,
                rate_rps=self._rate_rps(1.0),
                title="Attainment against the offered rate",
            )


def describe(goodput: Goodput, rate_rps: float) -> str:
    """A search's answer in a sentence; `rate_rps` is the rate at factor 1."""
    runs = f"{len(goodput.points)} runs"
    share = f"{100 * goodput.target:g} %"
    if goodput.factor is None:
        return f"goodput: below {goodput.points[0].factor * rate_rps:.3g} requests/s for {share} ({runs})"
    found = f"{goodput.factor * rate_rps:.3g} requests/s (factor {goodput.factor:.3g})"
    if goodput.failed_factor is None:
        return f"goodput: at least {found} for {share} ({runs}; raise --high)"
    return f"goodput: {found} for {share}; missed at {goodput.failed_factor * rate_rps:.3g} requests/s ({runs})"


def _standing(now: LoadProgress) -> str:
    promised = sum(tier.promised for tier in now.tiers)
    attained = sum(tier.attained for tier in now.tiers)
    attainment = f"{100 * attained / promised:.1f} %" if promised else "-"
    return f"{now.sent:,} of {now.planned:,} sent, {now.in_flight:,} open, attainment {attainment}"


def _settings(args: argparse.Namespace) -> dict[str, object]:
    hidden = {"func", "command", "api_key"}
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in hidden
    }


def _raise_file_limit() -> None:
    """Every open request is a socket: take all file descriptors that the system grants without asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and soft < _SPARE_FILES + LoadOptions().max_in_flight:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
