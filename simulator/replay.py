"""Replays a recorded engine log through the engine model, to see how true the model is.

The log says when each request came and how many tokens it had; the model, on a virtual clock, says when its tokens
come. Host time is no part of kernel profiles: it is fitted on one part of the log and judged on the rest.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiergate_engine.model import EngineConfig, EngineModel, PlannedStep, SequenceSpec, SequenceTooLong
from tiergate_engine.step import Step, StepTime

_Floats = npt.NDArray[np.float64]
_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "first_token_s", "last_token_s")
_MOST_HOST_STEP_S = 5e-3
_MOST_HOST_SEQ_S = 1e-4


class ReplayError(ValueError):
    """A log that cannot be read or replayed; the message names the place and the remedy."""


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """One request as the engine served it. Times are seconds since the log's start."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True, slots=True)
class EngineLog:
    """A recorded run, by arrival, and the settings of the engine that made it.

    `profile` names the latency profile of its hardware and model; None: there is none, and a step time has to be
    fitted from the log (`simulator.fit_log`). `config` has no host time. `engines` of these settings served the
    log, step by step together (data parallel ranks of one model).
    """

    name: str
    hardware: str
    model: str
    engine: str
    profile: str | None
    origin: str
    licence: str
    config: EngineConfig
    requests: tuple[LoggedRequest, ...]
    engines: int = 1


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kv_tokens: int
    max_model_tokens: int
    max_running_seqs: int
    max_batched_tokens: int
    block_tokens: int = 16
    prefix_caching: bool = False
    async_scheduling: bool = False
    whole_prompt: bool = True
    priority_scheduling: bool = False


class _LogFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    hardware: str
    model: str
    engine: str
    profile: str | None = None
    origin: str
    licence: str
    notes: str = ""
    requests: str  # a CSV (gzip) beside this file
    engines: int = Field(default=1, ge=1)
    config: _Config


def shipped_logs() -> tuple[str, ...]:
    """Names of the logs in this package."""
    names = (entry.name for entry in (resources.files("simulator") / "data").iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_log(name_or_path: str) -> EngineLog:
    """Read a shipped log by name, or any log by the path of its JSON file. Raises ReplayError."""
    if name_or_path in shipped_logs():
        folder: Traversable = resources.files("simulator") / "data"
        file = folder / f"{name_or_path}.json"
    else:
        path = Path(name_or_path)
        folder, file = path.parent, path
    try:
        head = _LogFile.model_validate_json(file.read_bytes())
        text = gzip.decompress((folder / head.requests).read_bytes()).decode()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReplayError(f"{name_or_path}: {place}: {first['msg']}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        known = ", ".join(shipped_logs())
        raise ReplayError(f"{name_or_path}: {error}; logs that come with tiergate: {known}") from error
    return EngineLog(
        name=head.name,
        hardware=head.hardware,
        model=head.model,
        engine=head.engine,
        profile=head.profile,
        origin=head.origin,
        licence=head.licence,
        config=EngineConfig(**head.config.model_dump()),
        requests=_parse_requests(text, head.requests),
        engines=head.engines,
    )


def _parse_requests(text: str, where: str) -> tuple[LoggedRequest, ...]:
    requests = []
    for line, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            values = [float(row[column]) for column in _COLUMNS]
        except (KeyError, TypeError, ValueError) as error:
            raise ReplayError(
                f"{where}, line {line}: needs numbers in the columns {', '.join(_COLUMNS)}"
            ) from error
        arrival_s, prompt, output, first_s, last_s = values
        if output < 2 or prompt < 1 or not arrival_s <= first_s <= last_s:
            raise ReplayError(f"{where}, line {line}: needs a prompt, at least 2 tokens, and times in order")
        requests.append(LoggedRequest(arrival_s, int(prompt), int(output), first_s, last_s))
    return tuple(sorted(requests, key=lambda request: request.arrival_s))


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the model made of a log, aligned with its requests."""

    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]
    answer_s: tuple[float, ...]  # from the first to the last token
    steps: int
    preemptions: int
    makespan_s: float


@dataclass(frozen=True, slots=True)
class CommonStep:
    """One step of all engines of a log together: what it held, and when it ended."""

    step: Step
    ends_s: float


def replay(
    requests: Sequence[LoggedRequest],
    config: EngineConfig,
    step_time: StepTime,
    engines: int = 1,
    on_step: Callable[[CommonStep], None] | None = None,
) -> Replayed:
    """Serve the requests on modelled engines and a virtual clock. Raises ReplayError when one cannot fit.

    Several engines are data parallel ranks: they step together, since their experts wait for each other's tokens,
    and a common step takes as long as one that holds what they hold together. A request goes to the engine
    with the least 4 x waiting + running (vLLM, `DPLBAsyncMPClient`; there the counts may be 100 ms old).
    """
    ranks = [EngineModel(config, step_time) for _ in range(engines)]
    pending = deque(enumerate(requests))
    first_s = [0.0] * len(requests)
    last_s = [0.0] * len(requests)
    now_s = 0.0

    def submit_until(limit_s: float) -> None:
        while pending and pending[0][1].arrival_s <= limit_s:
            index, request = pending.popleft()
            spec = SequenceSpec(str(index), request.prompt_tokens, request.output_tokens)
            try:
                min(ranks, key=lambda rank: 4 * rank.waiting + rank.running).submit(spec, request.arrival_s)
            except SequenceTooLong as error:
                raise ReplayError(f"request {index + 1} of the log: {error}") from error

    while pending or not all(rank.idle for rank in ranks):
        submit_until(now_s)
        planned = [(rank, plan) for rank in ranks if (plan := rank.next_step(now_s)) is not None]
        if not planned:
            now_s = pending[0][1].arrival_s
            continue
        ends_s = _common_end_s([plan for _, plan in planned], step_time)
        submit_until(ends_s)
        now_s = ends_s
        if on_step is not None:
            on_step(CommonStep(sum((plan.step for _, plan in planned), Step()), ends_s))
        for token in chain.from_iterable(rank.finish_step_milestones(now_s) for rank, _ in planned):
            index = int(token.sequence_id)
            if token.index == 0:
                first_s[index] = now_s
            if token.finished:
                last_s[index] = now_s
    return Replayed(
        ttft_s=tuple(first - request.arrival_s for first, request in zip(first_s, requests, strict=True)),
        tpot_s=tuple(
            (last - first) / (request.output_tokens - 1)
            for first, last, request in zip(first_s, last_s, requests, strict=True)
        ),
        answer_s=tuple(last - first for first, last in zip(first_s, last_s, strict=True)),
        steps=max(rank.steps for rank in ranks),
        preemptions=sum(rank.preemptions for rank in ranks),
        makespan_s=now_s,
    )


def _common_end_s(plans: Sequence[PlannedStep], step_time: StepTime) -> float:
    """When a step of several engines ends; host time runs beside each other's."""
    if len(plans) == 1:
        return plans[0].ends_s
    host_s = max(plan.duration_s - step_time.seconds(plan.step) for plan in plans)
    return plans[0].started_s + step_time.seconds(sum((plan.step for plan in plans), Step())) + host_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """One statistic of the log and of the replay, in seconds."""

    name: str
    logged_s: float
    replayed_s: float

    @property
    def error(self) -> float:
        """Relative error; negative when the model is too fast."""
        return self.replayed_s / self.logged_s - 1.0


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a replay compares with its log over some of the requests.

    `tpot_request_error` is the mean of |replayed / logged - 1| over the requests' own TPOT.
    """

    requests: int
    ttft: tuple[Comparison, ...]
    tpot: tuple[Comparison, ...]
    tpot_request_error: float


_STATISTICS: tuple[tuple[str, Callable[[_Floats], np.floating]], ...] = (
    ("mean", np.mean),
    ("P50", lambda values: np.percentile(values, 50)),
    ("P90", lambda values: np.percentile(values, 90)),
    ("P99", lambda values: np.percentile(values, 99)),
)


def compare(log: EngineLog, replayed: Replayed, part: slice) -> Fidelity:
    """Compare TTFT (from arrival) and TPOT over the requests in `part`, by order of arrival."""
    requests = log.requests[part]
    ttft_s = np.array([request.first_token_s - request.arrival_s for request in requests])
    tpot_s = np.array([(r.last_token_s - r.first_token_s) / (r.output_tokens - 1) for r in requests])
    ttft_model_s, tpot_model_s = np.array(replayed.ttft_s[part]), np.array(replayed.tpot_s[part])
    return Fidelity(
        requests=len(requests),
        ttft=tuple(Comparison(name, float(of(ttft_s)), float(of(ttft_model_s))) for name, of in _STATISTICS),
        tpot=tuple(Comparison(name, float(of(tpot_s)), float(of(tpot_model_s))) for name, of in _STATISTICS),
        tpot_request_error=float(np.mean(np.abs(tpot_model_s / tpot_s - 1.0))),
    )


class HostTime(Enum):
    """What host time is proportional to."""

    STEP = "step"
    SEQUENCE = "seq"


def fit_host_time(log: EngineLog, step_time: StepTime, kind: HostTime, part: slice) -> EngineConfig:
    """The log's settings with the host time under which TPOT over `part` comes out best (mean error by request).

    TPOT is what host time acts on directly; under overload TTFT is the sum of thousands of steps and would fit
    whatever else is wrong. Two grids, the second around the best of the first: the error is not smooth.
    """
    most_s = _MOST_HOST_STEP_S if kind is HostTime.STEP else _MOST_HOST_SEQ_S

    def configured(host_s: float) -> EngineConfig:
        if kind is HostTime.STEP:
            return replace(log.config, host_step_s=host_s)
        return replace(log.config, host_seq_s=host_s)

    def error(host_s: float) -> float:
        replayed = replay(log.requests, configured(host_s), step_time, log.engines)
        return compare(log, replayed, part).tpot_request_error

    coarse = [most_s * i / 20 for i in range(21)]
    best = min(coarse, key=error)
    fine = [max(best + most_s * i / 200, 0.0) for i in range(-9, 10)]
    return configured(min(fine, key=error))
