"""Who comes: every request of a load, planned ahead and seeded, so the same seed offers the same load."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loadgen.arrivals import gamma
from loadgen.traces import Trace, TraceRequest
from scheduling.tiers import Slo


class WorkloadError(ValueError):
    """A workload cannot be planned; the message names what is wrong."""


@dataclass(frozen=True, slots=True)
class TierShare:
    """A tier and its share of the requests (any positive weight)."""

    name: str
    slo: Slo
    share: float


@dataclass(frozen=True, slots=True)
class TierMix:
    """Which share of the requests asks for which tier."""

    shares: tuple[TierShare, ...]

    def __post_init__(self) -> None:
        if not self.shares:
            raise WorkloadError("tiers: at least one tier is needed")
        names = [share.name for share in self.shares]
        if len(set(names)) != len(names):
            raise WorkloadError(f"tiers: names must differ, got {names}")
        for share in self.shares:
            if not share.name or not share.name.isascii() or not share.name.isprintable():
                raise WorkloadError(f"tiers: {share.name!r} cannot be sent in a header: use plain ASCII")
            if not (math.isfinite(share.share) and share.share > 0):
                raise WorkloadError(f"tiers: the share of {share.name} must be positive, not {share.share!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(share.name for share in self.shares)

    def draw(self, rng: random.Random, count: int) -> list[TierShare]:
        """A tier for each of `count` requests, independently."""
        return rng.choices(self.shares, weights=[share.share for share in self.shares], k=count)


def parse_mix(text: str, known: Mapping[str, Slo]) -> TierMix:
    """Read ``name=share[:ttft_ms/tpot_ms]`` separated by commas, e.g. ``chat=0.7:1000/50,batch=0.3:-/-``.

    Without the part after the colon, the SLO comes from `known`; ``-`` is no promise. A missing ``=share`` is 1.
    Raises WorkloadError naming the entry.
    """
    shares = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        head, colon, slo_text = entry.partition(":")
        name, equals, share_text = head.partition("=")
        name = name.strip()
        try:
            share = float(share_text) if equals else 1.0
            slo = _parse_slo(slo_text) if colon else known[name]
        except KeyError:
            raise WorkloadError(
                f"tiers: no SLO is known for {name!r}; write {name}={share_text or 1}:TTFT_MS/TPOT_MS, "
                f"or name one of {sorted(known)}"
            ) from None
        except ValueError as error:
            raise WorkloadError(f"tiers: {entry!r} must read name=share:ttft_ms/tpot_ms ({error})") from None
        shares.append(TierShare(name, slo, share))
    return TierMix(tuple(shares))


def _parse_slo(text: str) -> Slo:
    ttft_text, slash, tpot_text = (part.strip() for part in text.partition("/"))
    if not slash:
        raise ValueError("two numbers of milliseconds with a slash between them")
    ttft_s, tpot_s = (None if part in {"-", ""} else float(part) / 1e3 for part in (ttft_text, tpot_text))
    return Slo(ttft_s, tpot_s)


@dataclass(frozen=True, slots=True)
class Window:
    """What is measured: requests arriving in [warmup_s, warmup_s + measured_s).

    Load before and after (cool-down) is offered but not scored; the cool-down keeps the fleet busy while the last
    measured requests finish, and ends as soon as they have.
    """

    warmup_s: float
    measured_s: float
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("warmup_s", "cooldown_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise WorkloadError(f"{name} must be zero or more seconds, not {getattr(self, name)!r}")
        if not (math.isfinite(self.measured_s) and self.measured_s > 0):
            raise WorkloadError(f"the measured time must be positive, not {self.measured_s!r} s")

    @property
    def total_s(self) -> float:
        return self.warmup_s + self.measured_s + self.cooldown_s

    def measures(self, at_s: float) -> bool:
        return self.warmup_s <= at_s < self.warmup_s + self.measured_s


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request that will be sent at `at_s` after the start, whatever the server does.

    `output_tokens` is the true length of the answer; only the (emulated) engine is told.
    """

    index: int
    at_s: float
    tier: str
    slo: Slo
    prompt_tokens: int
    output_tokens: int
    measured: bool = True
    streamed: bool = True
    client: str | None = None
    prefix_blocks: tuple[int, ...] = ()
    block_tokens: int | None = None


def plan(
    trace: Trace,
    mix: TierMix,
    window: Window,
    seed: int,
    *,
    unstreamed_share: float = 0.0,
    max_requests: int | None = None,
) -> tuple[PlannedRequest, ...]:
    """Give every request of a trace that arrives inside the window its tier.

    Tiers and streaming are drawn from `seed` by position in the trace, independently of lengths and times, so two
    loads with the same seed and different rates put the same requests in the same tiers.
    Raises WorkloadError when nothing arrives in the measured time.
    """
    rng = random.Random(f"{seed}:tiers")
    tiers = mix.draw(rng, len(trace.requests))
    streamed = [rng.random() >= unstreamed_share for _ in trace.requests]
    planned: list[PlannedRequest] = []
    for index, (item, share) in enumerate(zip(trace.requests, tiers, strict=True)):
        if item.arrival_s >= window.total_s or (max_requests is not None and len(planned) >= max_requests):
            break
        planned.append(
            PlannedRequest(
                index=index,
                at_s=item.arrival_s,
                tier=share.name,
                slo=share.slo,
                prompt_tokens=item.prompt_tokens,
                output_tokens=item.output_tokens,
                measured=window.measures(item.arrival_s),
                streamed=streamed[index],
                client=item.client,
                prefix_blocks=item.prefix_blocks,
                block_tokens=trace.block_tokens,
            )
        )
    if not any(request.measured for request in planned):
        raise WorkloadError(
            f"nothing arrives in the measured time, {window.warmup_s:g} s to "
            f"{window.warmup_s + window.measured_s:g} s of {trace.name}"
        )
    return tuple(planned)


def synthetic_trace(
    rate_rps: float, duration_s: float, prompt_tokens: int, output_tokens: int, seed: int, cv: float = 1.0
) -> Trace:
    """Fixed lengths, random gaps: Poisson, or with bursts when `cv` is above 1 (see `arrivals.gamma`)."""
    for name, tokens in (("prompt tokens", prompt_tokens), ("output tokens", output_tokens)):
        if tokens < 1:
            raise WorkloadError(f"{name} must be at least 1, not {tokens}")
    arrivals = gamma(rate_rps, duration_s, cv, random.Random(f"{seed}:arrivals"))
    name = f"Poisson {rate_rps:g}/s" if cv == 1.0 else f"Gamma {rate_rps:g}/s, CV {cv:g}"
    return Trace(name, tuple(TraceRequest(at_s, prompt_tokens, output_tokens) for at_s in arrivals))


_SYLLABLES = (
    "bab",
    "dol",
    "fen",
    "gir",
    "kum",
    "lat",
    "mos",
    "nid",
    "pav",
    "rug",
    "sel",
    "tob",
    "vik",
    "wan",
    "zep",
)
_FILLER_WORDS = 4096
_WORD_CHARS = 4  # three letters and a space: the four characters a token that estimates assume


class WordPrompts:
    """Prompts of exactly N words: N tokens for the emulated engine, which counts words.

    For a real engine, `words_per_token` is the measured ratio. Every prompt begins with a word of its own, so that
    no prefix cache helps where the trace has no shared prefixes; with prefix blocks, equal ids give equal text.
    """

    __slots__ = ("_filler", "_ratio", "_seed")

    def __init__(self, seed: int, words_per_token: float = 1.0) -> None:
        if not (math.isfinite(words_per_token) and words_per_token > 0):
            raise WorkloadError(f"words per token must be positive, not {words_per_token!r}")
        rng = random.Random(f"{seed}:words")
        self._filler = "".join(f" {word}" for word in rng.choices(_SYLLABLES, k=_FILLER_WORDS))
        self._seed = seed
        self._ratio = words_per_token

    def text(self, request: PlannedRequest, template_tokens: int = 0) -> str:
        """The prompt of a request; `template_tokens` fewer, because the server adds them itself."""
        words = max(round((request.prompt_tokens - template_tokens) * self._ratio), 1)
        if not request.prefix_blocks or not request.block_tokens:
            return self._passage(f"r{self._seed}.{request.index}", words)
        block_words = max(round(request.block_tokens * self._ratio), 1)
        passages = []
        for block in request.prefix_blocks:
            if words <= 0:
                break
            passages.append(self._passage(f"b{block}", min(block_words, words)))
            words -= block_words
        if words > 0:
            passages.append(self._passage(f"r{self._seed}.{request.index}", words))
        return " ".join(passages)

    def _passage(self, first: str, words: int) -> str:
        whole, rest = divmod(words - 1, _FILLER_WORDS)
        return first + self._filler * whole + self._filler[: _WORD_CHARS * rest]


class TokenIdPrompts:
    """Prompts as lists of token ids: exact for any engine that takes them (vLLM's completions)."""

    __slots__ = ("_first_id", "_last_id", "_seed")

    def __init__(self, seed: int, vocabulary: int, first_id: int = 16) -> None:
        if vocabulary <= first_id:
            raise WorkloadError(f"the vocabulary must have more than {first_id} tokens, not {vocabulary}")
        self._seed = seed
        self._first_id = first_id
        self._last_id = vocabulary - 1

    def ids(self, request: PlannedRequest) -> Sequence[int]:
        """The prompt of a request."""
        ids: list[int] = []
        if request.block_tokens:
            for block in request.prefix_blocks:
                ids += self._passage(f"b{block}", request.block_tokens)
        del ids[request.prompt_tokens :]
        ids += self._passage(f"r{self._seed}.{request.index}", request.prompt_tokens - len(ids))
        return ids

    def _passage(self, name: str, count: int) -> list[int]:
        rng = random.Random(name)
        return rng.choices(range(self._first_id, self._last_id + 1), k=count)
