"""What an SGLang server says of itself: /server_info, read once, and /v1/loads, read again and again.

Both differ from version to version, so whatever is missing is unknown. Read in the source of 0.5.12 to 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import starmap

from adapters.monitored import positive_int

PLUGIN_STATE = "tiergate"
"""The member of a scheduler's internal state that Tiergate's plug-in adds."""

_MOST = 1e15
# In the order of their age; the first that the scheduler tells of is the one it takes.
_CAP_NAMES = ("pp_max_micro_batch_size", "max_micro_batch_size")


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """The chunk sizes that the plug-in takes: from `least` on in multiples of `multiple`, and `most`."""

    now: int
    least: int
    most: int
    multiple: int

    def nearest(self, tokens: int | None) -> int:
        """The size to ask for, not above `tokens` unless that is below the least; None is the most."""
        if tokens is None or tokens >= self.most:
            return self.most
        return max(tokens // self.multiple * self.multiple, self.least)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What /server_info tells.

    Attributes:
        ranks: data-parallel ranks, each with its own scheduler.
        stages: pipeline stages; the running cap counts for each micro-batch.
        running_per_rank: most sequences that a rank may run.
        cap_name: under which name the running cap is set; None when the server has none.
        cap: the running cap in force, for each micro-batch of each rank.
        chunk: what the plug-in takes; None without the plug-in.
        mixed: whether chunks run in one step with decodes, as the plug-in tells, else as it was started.
        launched_interval: steps of decodes behind each chunk that it was started with, where these are not mixed.
        interval: steps of decodes behind each chunk that it was started with; None when that cannot be set.
        schedules_by_priority: whether a request's priority decides anything.
        low_values_first: whether smaller priorities come first.
        most_apart: the largest difference of two priorities that preempts nobody; None when nothing ever does.
    """

    version: str | None
    ranks: int
    stages: int
    running_per_rank: int | None
    cap_name: str | None
    cap: int | None
    chunk: ChunkRange | None
    mixed: bool
    launched_interval: int
    interval: int | None
    prefill_tokens: int | None
    kv_tokens: int | None
    page_tokens: int | None
    schedules_by_priority: bool | None
    low_values_first: bool
    most_apart: int | None

    @classmethod
    def read(cls, info: Mapping[str, object]) -> ServerInfo:
        """Read an answer; whatever is not in shape is unknown, never an error."""
        states = _objects(info.get("internal_states"))
        ranks = len(states) or positive_int(info.get("dp_size")) or 1
        first: Mapping[str, object] = states[0] if states else {}
        cap_name = next((name for name in _CAP_NAMES if positive_int(first.get(name))), None)
        per_rank = positive_int(first.get("effective_max_running_requests_per_dp"))
        if per_rank is None:
            total = positive_int(info.get("max_running_requests"))
            per_rank = max(total // ranks, 1) if total else None
        capacities = [
            _capacity(state) or positive_int(info.get("max_total_num_tokens")) for state in states or ({},)
        ]
        told = [capacity for capacity in capacities if capacity is not None]
        by_priority = info.get("enable_priority_scheduling")
        apart = positive_int(info.get("priority_scheduling_preemption_threshold")) or 0
        version, interval = info.get("version"), _interval(states)
        return cls(
            version=version if isinstance(version, str) else None,
            ranks=ranks,
            stages=positive_int(info.get("pp_size")) or 1,
            running_per_rank=per_rank,
            cap_name=cap_name,
            cap=positive_int(first.get(cap_name)) if cap_name else None,
            chunk=_chunk_range(states),
            mixed=_mixed(info, states),
            launched_interval=interval or positive_int(info.get("prefill_decode_interval")) or 0,
            interval=interval,
            prefill_tokens=positive_int(info.get("chunked_prefill_size"))
            or positive_int(info.get("max_prefill_tokens")),
            kv_tokens=sum(told) if len(told) == len(capacities) else None,
            page_tokens=positive_int(info.get("page_size")),
            schedules_by_priority=by_priority if isinstance(by_priority, bool) else None,
            low_values_first=info.get("schedule_low_priority_values_first") is True,
            most_apart=None if info.get("disable_priority_preemption") is True else apart,
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over decode steps since the server began: steps, sequences b, microseconds t, and b², b·t."""

    steps: float
    seqs: float
    time_us: float
    seqs_squared: float
    seqs_time_us: float

    def plus(self, other: Moments) -> Moments:
        return Moments(*starmap(_add, zip(self._sums(), other._sums(), strict=True)))

    def since(self, earlier: Moments) -> Moments | None:
        """The steps between two readings; None when the server began anew in between."""
        differences = [now - before for now, before in zip(self._sums(), earlier._sums(), strict=True)]
        return None if min(differences) < 0.0 else Moments(*differences)

    def _sums(self) -> tuple[float, ...]:
        return (self.steps, self.seqs, self.time_us, self.seqs_squared, self.seqs_time_us)


@dataclass(frozen=True, slots=True)
class DecodeFit:
    """Decode steps between two readings: their mean, and by least squares ``base_s + per_seq_s * sequences``.

    The line is None when the batches were too alike to tell one.
    """

    steps: int
    mean_seqs: float
    mean_step_s: float
    line: tuple[float, float] | None

    @classmethod
    def of(cls, moments: Moments) -> DecodeFit | None:
        """None without a step."""
        n = moments.steps
        if n < 1.0:
            return None
        line = None
        spread = n * moments.seqs_squared - moments.seqs**2
        if spread > 1e-6 * n * moments.seqs_squared:
            slope_us = (n * moments.seqs_time_us - moments.seqs * moments.time_us) / spread
            base_us = (moments.time_us - slope_us * moments.seqs) / n
            line = (base_us / 1e6, slope_us / 1e6)
        return cls(round(n), moments.seqs / n, moments.time_us / n / 1e6, line)


@dataclass(frozen=True, slots=True)
class Loads:
    """What /v1/loads tells, summed over ranks.

    Attributes:
        age_s: how old the oldest rank's word is. A busy scheduler tells every 15 decode steps only.
        waiting_tokens: prompt tokens in the queue that no cache holds.
        used_tokens: KV in use.
        prefill_tokens, prefill_us: prompt tokens computed since the server began, and the time it took.
    """

    running: int | None
    waiting: int | None
    waiting_tokens: int | None
    used_tokens: int | None
    kv_used_fraction: float | None
    age_s: float | None
    moments: Moments | None
    prefill_tokens: int | None
    prefill_us: int | None

    @classmethod
    def read(cls, answer: Mapping[str, object]) -> Loads | None:
        """Read an answer; None when it tells of no rank. A number that a rank leaves out is unknown."""
        ranks = _objects(answer.get("loads"))
        if not ranks:
            return None
        usages = [_number(rank.get("token_usage")) for rank in ranks]
        known = [usage for usage in usages if usage is not None]
        return cls(
            running=_sum(ranks, "num_running_reqs"),
            waiting=_sum(ranks, "num_waiting_reqs"),
            waiting_tokens=_sum(ranks, "num_waiting_uncached_tokens"),
            used_tokens=_sum(ranks, "num_used_tokens"),
            kv_used_fraction=min(sum(known) / len(known), 1.0) if known else None,
            age_s=_age_s(answer, ranks),
            moments=_moments(ranks),
            prefill_tokens=_sum(ranks, "total_prefill_uncached_tokens"),
            prefill_us=_sum(ranks, "total_prefill_busy_us"),
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the server was between two readings of its loads. None where nothing was to be seen."""

    decode: DecodeFit | None
    prefill_token_s: float | None

    @classmethod
    def between(cls, earlier: Loads, later: Loads) -> Pace:
        steps = later.moments.since(earlier.moments) if earlier.moments and later.moments else None
        per_token = None
        if None not in (earlier.prefill_tokens, later.prefill_tokens, earlier.prefill_us, later.prefill_us):
            tokens = (later.prefill_tokens or 0) - (earlier.prefill_tokens or 0)
            busy_us = (later.prefill_us or 0) - (earlier.prefill_us or 0)
            per_token = busy_us / tokens / 1e6 if tokens > 0 and busy_us >= 0 else None
        return cls(DecodeFit.of(steps) if steps else None, per_token)


def _add(one: float, other: float) -> float:
    return one + other


def _objects(value: object) -> list[Mapping[str, object]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _number(value: object) -> float | None:
    """A number that counts something; not-a-number and what is beyond all counting are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _MOST else None


def _sum(ranks: Sequence[Mapping[str, object]], name: str) -> int | None:
    values = [_number(rank.get(name)) for rank in ranks]
    known = [value for value in values if value is not None]
    return round(sum(known)) if len(known) == len(values) else None


def _moments(ranks: Sequence[Mapping[str, object]]) -> Moments | None:
    found = Moments(0.0, 0.0, 0.0, 0.0, 0.0)
    for rank in ranks:
        told = rank.get("decode_moments", ())
        if told is None:
            continue  # a rank that has not decoded yet
        sums = [_number(one) for one in told] if isinstance(told, list) else []
        whole = [one for one in sums[:5] if one is not None]
        if len(whole) < 5:
            return None
        found = found.plus(Moments(*whole))
    return found


def _age_s(answer: Mapping[str, object], ranks: Sequence[Mapping[str, object]]) -> float | None:
    """By the server's own clock, which stamps the answer and each rank's word."""
    stamp = answer.get("timestamp")
    told = [one for one in (_number(rank.get("timestamp")) for rank in ranks) if one]
    if not isinstance(stamp, str) or not told:
        return None
    try:
        asked = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    # One without a zone would be read as local time here, whatever it is there.
    return None if asked.tzinfo is None else max(asked.timestamp() - min(told), 0.0)


def _capacity(state: Mapping[str, object]) -> int | None:
    memory = state.get("memory_usage")
    return positive_int(memory.get("token_capacity")) if isinstance(memory, dict) else None


def _plugin(state: Mapping[str, object]) -> Mapping[str, object]:
    told = state.get(PLUGIN_STATE)
    return told if isinstance(told, dict) else {}


def _mixed(info: Mapping[str, object], states: Sequence[Mapping[str, object]]) -> bool:
    """As every rank's plug-in tells; where there is none, as the server was started."""
    told = [_plugin(state).get("mixed") for state in states]
    if told and all(isinstance(one, bool) for one in told):
        return all(told)
    return info.get("enable_mixed_chunk") is True


def _interval(states: Sequence[Mapping[str, object]]) -> int | None:
    """What every rank was started with; None when one has none, or they do not agree."""
    found: set[int] = set()
    for state in states:
        told = _plugin(state).get("prefill_decode_interval")
        launched = told.get("launched") if isinstance(told, dict) else None
        if isinstance(launched, bool) or not isinstance(launched, int) or launched < 0:
            return None
        found.add(launched)
    return found.pop() if len(found) == 1 else None


def _chunk_range(states: Sequence[Mapping[str, object]]) -> ChunkRange | None:
    """What every rank's plug-in takes; None when one has none, or they do not agree."""
    found: set[ChunkRange] = set()
    for state in states:
        sizes = _plugin(state).get("chunked_prefill_size")
        if not isinstance(sizes, dict):
            return None
        numbers = [positive_int(sizes.get(name)) for name in ("now", "least", "most", "multiple")]
        whole = [one for one in numbers if one is not None]
        if len(whole) < 4:
            return None
        found.add(ChunkRange(*whole))
    return found.pop() if len(found) == 1 else None
