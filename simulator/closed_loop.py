"""Checks the engine model against closed-loop benchmarks: a fixed number of clients, each asking again at once.

The rows say what a real engine gave: mean TTFT and TPOT by prompt length, answer length and concurrency. The
engine model is run under the same load with a shipped profile as it is; nothing is fitted to the rows but, in a
check of its own, host time per sequence, on every other row and judged on the rest.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np

from tiergate_engine.model import EngineConfig, EngineModel, SequenceSpec
from tiergate_engine.step import StepTime

_FILE = "closed-loop-llama-3.1-8b.csv"
_MOST_HOST_SEQ_S = 6e-5
_WAVES = 4  # requests of a client; the first is warm-up, and the last only keeps the others company


@dataclass(frozen=True, slots=True)
class ClosedLoopRow:
    """One benchmark: `clients` at a time, prompts and answers of one length.

    `profile` names the latency profile of its GPU, model and precision; `excluded` says why the row is not to be
    believed, None when it is.
    """

    system: str
    engine: str
    profile: str
    prompt_tokens: int
    output_tokens: int
    clients: int
    ttft_s: float
    tpot_s: float
    excluded: str | None

    @property
    def request_s(self) -> float:
        """From asking to the last token."""
        return self.ttft_s + self.tpot_s * (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class ClosedLoopTimes:
    """Mean times of the requests of a closed loop, the clients' first and last ones left out.

    `first_ttft_s` is the mean TTFT of the clients' first requests, which all come at once.
    """

    ttft_s: float
    tpot_s: float
    first_ttft_s: float

    def request_s(self, output_tokens: int) -> float:
        """From asking to the last token."""
        return self.ttft_s + self.tpot_s * (output_tokens - 1)


@dataclass(frozen=True, slots=True)
class ClosedLoopCheck:
    """A row, and what the model makes of it."""

    row: ClosedLoopRow
    model: ClosedLoopTimes

    @property
    def ttft_error(self) -> float:
        """Relative; negative when the model is too fast."""
        return self.model.ttft_s / self.row.ttft_s - 1.0

    @property
    def tpot_error(self) -> float:
        return self.model.tpot_s / self.row.tpot_s - 1.0

    @property
    def request_error(self) -> float:
        """Of a whole request's time, which is what a closed loop's throughput depends on."""
        return self.model.request_s(self.row.output_tokens) / self.row.request_s - 1.0


def load_rows() -> tuple[ClosedLoopRow, ...]:
    """The rows that come with this package, excluded ones too."""
    text = (resources.files("simulator") / "data" / _FILE).read_text()
    return tuple(
        ClosedLoopRow(
            system=row["system"],
            engine=f"{row['backend']} {row['backend_version']}",
            profile=row["profile"],
            prompt_tokens=int(row["isl"]),
            output_tokens=int(row["osl"]),
            clients=int(row["concurrency"]),
            ttft_s=float(row["ttft_ms"]) / 1e3,
            tpot_s=float(row["tpot_ms"]) / 1e3,
            excluded=row["excluded"] or None,
        )
        for row in csv.DictReader(text.splitlines())
    )


def check(row: ClosedLoopRow, config: EngineConfig, step_time: StepTime) -> ClosedLoopCheck:
    """Run a row's load."""
    times = run_closed_loop(config, step_time, row.prompt_tokens, row.output_tokens, row.clients)
    return ClosedLoopCheck(row, times)


def fit_host_seq(rows: Sequence[ClosedLoopRow], config: EngineConfig, step_time: StepTime) -> EngineConfig:
    """The settings with the host time per sequence under which the rows' TPOT comes out best, in mean error.

    `step_time` must be without host time. A grid, then a finer one around its best.
    """

    def configured(host_s: float) -> EngineConfig:
        return replace(config, host_seq_s=host_s)

    def error(host_s: float) -> float:
        return float(np.mean([abs(check(row, configured(host_s), step_time).tpot_error) for row in rows]))

    coarse = [_MOST_HOST_SEQ_S * i / 8 for i in range(9)]
    best = min(coarse, key=error)
    fine = [max(best + _MOST_HOST_SEQ_S * i / 40, 0.0) for i in range(-4, 5)]
    return configured(min(fine, key=error))


def run_closed_loop(
    config: EngineConfig, step_time: StepTime, prompt_tokens: int, output_tokens: int, clients: int
) -> ClosedLoopTimes:
    """Run one engine under `clients` that each send their next request when the last one ends.

    All clients begin at once, as such benchmarks do. Raises SequenceTooLong when a request does not fit.
    """
    engine = EngineModel(config, step_time)
    now_s = 0.0
    waves = [0] * clients
    asked_s = [0.0] * clients
    first_s = [0.0] * clients
    ttft_s: list[list[float]] = [[] for _ in range(_WAVES)]
    tpot_s: list[list[float]] = [[] for _ in range(_WAVES)]
    left = clients
    for client in range(clients):
        engine.submit(SequenceSpec(str(client), prompt_tokens, output_tokens), now_s)
    while left:
        planned = engine.next_step(now_s)
        assert planned is not None  # a client without an answer has a request in the engine
        now_s = planned.ends_s
        for token in engine.finish_step_milestones(now_s):
            client = int(token.sequence_id)
            wave = min(waves[client], _WAVES - 1)
            if token.index == 0:
                first_s[client] = now_s
                ttft_s[wave].append(now_s - asked_s[client])
            if token.finished:
                tpot_s[wave].append((now_s - first_s[client]) / (output_tokens - 1))
                waves[client] += 1
                left -= waves[client] == _WAVES - 1
                asked_s[client] = now_s
                engine.submit(SequenceSpec(token.sequence_id, prompt_tokens, output_tokens), now_s)
    counted = range(1, _WAVES - 1)
    return ClosedLoopTimes(
        ttft_s=_mean(ttft_s, counted), tpot_s=_mean(tpot_s, counted), first_ttft_s=_mean(ttft_s, range(1))
    )


def _mean(by_wave: Sequence[Sequence[float]], waves: range) -> float:
    return float(np.mean([value for wave in waves for value in by_wave[wave]]))
