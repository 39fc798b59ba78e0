"""Step times: a roofline formula, measured tables with the formula around them, and an online correction.

All three are immutable, in seconds, continuous and non-decreasing in every argument (an empty step takes
nothing; the first token of any kind brings the whole cost of a step). They answer the hottest question of the
product, so the methods are plain arithmetic on numbers that were prepared when the object was made.
Arguments must not be negative, and without prefill tokens the other prefill sums mean nothing and are ignored;
neither is checked on the way.

A chunk makes an engine read what the decodes hold in KV a second time, and the chunk's own context once. Both
costs are there as soon as there is a chunk, which would be a jump from zero to one prefill token. They come in
over the first `RAMP_TOKENS` prefill tokens of a step instead, so that step times stay continuous.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

from tiergate_engine.curves import Curve, Surface
from tiergate_engine.step import Step, StepTime

RAMP_TOKENS = 16
"""Prefill tokens in a step over which the costs of having a chunk at all come in, linearly."""

_DENSE_SEQS = 1024  # decode batches up to this size are looked up; bigger ones are computed
_SECANT_TRIES = 10
_MAX_SHARPNESS = 32.0  # beyond, the smooth maximum is a maximum and its power could overflow


class _StepTime:
    """What follows from `seconds_of` alone, the same for every step time. No ABC: compiled, a slotted dataclass
    cannot derive from one."""

    __slots__ = ()

    @abstractmethod
    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`."""

    def seconds(self, step: Step) -> float:
        """Predicted duration of `step`; 0.0 for an empty one."""
        return self.seconds_of(
            step.prefill_tokens,
            step.prefill_seqs,
            step.prefill_context_tokens,
            step.prefill_attention,
            step.decode_seqs,
            step.decode_kv_tokens,
        )

    def chunk_tokens(self, base: Step, within_s: float, context_tokens: int, limit_tokens: int) -> int:
        """The largest chunk behind `context_tokens` that keeps `base` plus it within a time; see `StepTime`."""
        return largest_chunk(self.seconds_of, base, within_s, context_tokens, limit_tokens)


@dataclass(frozen=True, slots=True)
class RooflineStepTime(_StepTime):
    """A step's time from its six sums: memory-bound and compute-bound parts joined by a smooth maximum.

    With T batched tokens, n decodes, kv their contexts' sum, c prefill tokens, p and a the chunks' context and
    attention sums (see `Step`), and r = min(c / RAMP_TOKENS, 1):

        t = c0 + (w^s + (cT T)^s)^(1/s) + cn n + ckv kv + cmix kv r + cp p r + cpp a

    The smooth maximum is the roofline (Williams, Waterman, Patterson, CACM 2009): reading the weights (w)
    against multiplying by them (cT T). A sum (s = 1) is its softest, a true maximum (s = 32) its sharpest form.

    Attributes:
        c0_s: launch and sampling time that every step has.
        weights_s: time to read the weights once (w).
        per_token_s: compute time of one token's linear layers (cT).
        sharpness: exponent s of the smooth maximum, 1 to 32.
        per_seq_s: per decode (cn).
        per_kv_s: per KV token the decodes read (ckv).
        mixed_kv_s: more of the same when the step also holds a chunk (cmix).
        per_context_s: per token of context in KV before a chunk (cp).
        per_attention_s: per query-key pair of a chunk (cpp).
        host_step_s, host_seq_s: host time per step and per decode; kernel measurements do not contain it.

    Raises:
        ValueError: a coefficient is negative or not finite, or the sharpness is out of range.
    """

    c0_s: float = 0.0
    weights_s: float = 0.0
    per_token_s: float = 0.0
    sharpness: float = 1.0
    per_seq_s: float = 0.0
    per_kv_s: float = 0.0
    mixed_kv_s: float = 0.0
    per_context_s: float = 0.0
    per_attention_s: float = 0.0
    host_step_s: float = 0.0
    host_seq_s: float = 0.0
    _linear: tuple[float, float, float, float, float, float, float] = field(
        init=False, repr=False, compare=False, default=(0.0,) * 7
    )
    _roof: tuple[float, float, float] = field(init=False, repr=False, compare=False, default=(1.0, 1.0, 0.0))
    _decode: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        for name in _COEFFICIENTS:
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} is {value!r}: a step-time coefficient is a finite number >= 0")
        if not 1.0 <= self.sharpness <= _MAX_SHARPNESS:
            raise ValueError(f"sharpness is {self.sharpness!r}: it must lie in 1 to {_MAX_SHARPNESS:g}")
        s = self.sharpness
        # The power is taken of (cT T) / w, so that neither tiny times nor many tokens leave the float range.
        ratio = self.per_token_s / self.weights_s if self.weights_s > 0.0 else 0.0
        fixed_s = self.c0_s + self.host_step_s
        per_seq_s = self.per_seq_s + self.host_seq_s
        if s == 1.0 or ratio == 0.0:
            # Without a bend the smooth maximum is a straight line: fold it into the linear part.
            fixed_s += self.weights_s
            per_token_s, weights_s = self.per_token_s, 0.0
        else:
            per_token_s, weights_s = 0.0, self.weights_s
        linear = (
            fixed_s,
            per_token_s,
            per_seq_s,
            self.per_kv_s,
            self.mixed_kv_s,
            self.per_context_s,
            self.per_attention_s,
        )
        object.__setattr__(self, "_linear", linear)
        object.__setattr__(self, "_roof", (weights_s, ratio, s))
        decode = tuple(self.linear_seconds(n) + per_seq_s * n for n in range(_DENSE_SEQS + 1))
        object.__setattr__(self, "_decode", decode)

    def linear_seconds(self, tokens: float) -> float:
        """The part that depends on the number of batched tokens only: c0, host time and the smooth maximum."""
        fixed, per_token, *_ = self._linear
        weights, ratio, s = self._roof
        roof = weights * (1.0 + (ratio * tokens) ** s) ** (1.0 / s) if weights else 0.0
        return fixed + per_token * tokens + roof

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`."""
        tokens = prefill_tokens + decode_seqs
        if not tokens:
            return 0.0
        fixed, per_token, per_seq, per_kv, mixed_kv, per_context, per_attention = self._linear
        seconds = fixed + per_token * tokens + per_seq * decode_seqs + per_kv * decode_kv_tokens
        if prefill_tokens:
            chunk = mixed_kv * decode_kv_tokens + per_context * prefill_context_tokens
            if prefill_tokens < RAMP_TOKENS:
                chunk *= prefill_tokens / RAMP_TOKENS
            seconds += chunk + per_attention * prefill_attention
        weights, ratio, s = self._roof
        if weights:
            seconds += weights * (1.0 + (ratio * tokens) ** s) ** (1.0 / s)
        return seconds

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """A step of decodes only: the steady state."""
        if decode_seqs <= _DENSE_SEQS:
            if not decode_seqs:
                return 0.0
            return self._decode[decode_seqs] + self.per_kv_s * decode_kv_tokens
        return self.seconds_of(0, 0, 0, 0.0, decode_seqs, decode_kv_tokens)


_COEFFICIENTS = (
    "c0_s",
    "weights_s",
    "per_token_s",
    "per_seq_s",
    "per_kv_s",
    "mixed_kv_s",
    "per_context_s",
    "per_attention_s",
    "host_step_s",
    "host_seq_s",
)


def largest_chunk(
    seconds_of: Callable[[int, int, int, float, int, float], float],
    base: Step,
    within_s: float,
    context_tokens: int,
    limit_tokens: int,
) -> int:
    """The largest chunk that fits, for any non-decreasing `seconds_of`; exact, in a handful of evaluations.

    A secant search inside a bracket (step times are nearly straight), which turns to bisection when a secant
    leaves the bracket or takes too long.
    """
    if limit_tokens <= 0:
        return 0
    tokens, seqs = base.prefill_tokens, base.prefill_seqs + 1
    context, attention = base.prefill_context_tokens + context_tokens, base.prefill_attention
    decodes, kv = base.decode_seqs, base.decode_kv_tokens

    def excess(c: int) -> float:
        area = attention + c * (context_tokens + c / 2)
        return seconds_of(tokens + c, seqs, context, area, decodes, kv) - within_s

    high, high_excess = limit_tokens, excess(limit_tokens)
    if high_excess <= 0.0:
        return limit_tokens
    low, low_excess = 1, excess(1)
    if not low_excess <= 0.0:
        return 0
    x0, f0, x1, f1 = low, low_excess, high, high_excess
    tries = 0
    while high - low > 1:
        tries += 1
        if f1 != f0 and tries < _SECANT_TRIES:
            crossing = x1 - f1 * (x1 - x0) / (f1 - f0)
            guess = min(max(int(crossing), low + 1), high - 1) if low < crossing < high else (low + high) // 2
        else:
            guess = (low + high) // 2
        x0, f0, x1, f1 = x1, f1, guess, excess(guess)
        if f1 <= 0.0:
            low = guess
        else:
            high = guess
    return low


@dataclass(frozen=True, slots=True)
class TableStepTime(_StepTime):
    """Measured tables with a formula around them. Decode-only and mixed steps have tables of their own.

    With the letters of `RooflineStepTime`, a step takes

        t = G(T) + A(n, kv) + B(a) + (cmix kv + cp p) r

    where G is the time of T tokens' linear layers with everything a step always has, A what n decodes with kv
    context tokens add to it (decode-only steps are G(n) + A(n, kv), so a table of whole decode steps D is given
    as A = D - G), and B what the chunks' attention adds (None: the formula's cpp a). Each part is non-decreasing,
    hence so is the sum; this is why the parts are tables and not the whole.

    Beyond a table's edge its part goes on as `beyond` does, scaled so that level and table meet at the edge's
    far corner: the formula's growth from the edge on, times table over formula there.

    Attributes:
        tokens: G over batched tokens.
        decode: A over (decodes, sum of their contexts).
        attention: B over attention area; starts at (0, 0).
        beyond: the formula; its cmix and cp also serve inside the tables.

    Raises:
        ValueError: `attention` does not start at (0, 0), or a table holds negative times.
    """

    tokens: Curve
    decode: Surface
    attention: Curve | None
    beyond: RooflineStepTime
    _scales: tuple[float, float, float] = field(init=False, repr=False, compare=False, default=(1.0, 1.0, 1.0))
    _few_tokens: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())
    _rows: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if self.tokens.values_s[0] < 0.0 or self.decode.rows_s[0][0] < 0.0:
            raise ValueError("a table of step times holds a negative time")
        attention = self.attention
        if attention is not None and (attention.axis[0] != 0.0 or attention.values_s[0] != 0.0):
            raise ValueError("the attention curve must start at area 0 with time 0")
        beyond = self.beyond
        seqs, kv = self.decode.row_axis[-1], self.decode.column_axis[-1]
        decode_s = (beyond.per_seq_s + beyond.host_seq_s) * seqs + beyond.per_kv_s * kv
        area_s = beyond.per_attention_s * attention.axis[-1] if attention is not None else 0.0
        scales = (
            _scale(self.tokens.values_s[-1], beyond.linear_seconds(self.tokens.axis[-1])),
            _scale(self.decode.rows_s[-1][-1], decode_s),
            _scale(attention.values_s[-1], area_s) if attention is not None else 1.0,
        )
        object.__setattr__(self, "_scales", scales)
        # A row of A for every whole number of decodes: the hot path then interpolates along kv only.
        columns = self.decode.column_axis
        last = min(_DENSE_SEQS, int(self.decode.row_axis[-1]))
        rows = tuple(tuple(self.decode.at(n, column) for column in columns) for n in range(last + 1))
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_few_tokens", tuple(self._linear_seconds(n) for n in range(_DENSE_SEQS + 1)))

    def _linear_seconds(self, tokens: int) -> float:
        edge = self.tokens.axis[-1]
        if tokens <= edge:
            return self.tokens.at(tokens)
        growth = self.beyond.linear_seconds(tokens) - self.beyond.linear_seconds(edge)
        return self.tokens.values_s[-1] + self._scales[0] * growth

    def _decode_part(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        decode = self.decode
        columns = decode.column_axis
        if decode_seqs < len(self._rows) and columns[0] <= decode_kv_tokens < columns[-1]:
            row = self._rows[decode_seqs]
            j = bisect_right(columns, decode_kv_tokens)
            x, y = columns[j - 1], row[j - 1]
            return y + (decode_kv_tokens - x) * (row[j] - y) / (columns[j] - x)
        beyond = self.beyond
        seconds = decode.at(decode_seqs, decode_kv_tokens)
        more_seqs = decode_seqs - decode.row_axis[-1]
        more_kv = decode_kv_tokens - decode.column_axis[-1]
        if more_seqs > 0:
            seconds += self._scales[1] * (beyond.per_seq_s + beyond.host_seq_s) * more_seqs
        if more_kv > 0:
            seconds += self._scales[1] * beyond.per_kv_s * more_kv
        return seconds

    def _attention_seconds(self, area: float) -> float:
        curve = self.attention
        if curve is None:
            return self.beyond.per_attention_s * area
        more = area - curve.axis[-1]
        if more > 0.0:
            return curve.values_s[-1] + self._scales[2] * self.beyond.per_attention_s * more
        return curve.at(area)

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`."""
        tokens = prefill_tokens + decode_seqs
        if not tokens:
            return 0.0
        seconds = self._few_tokens[tokens] if tokens <= _DENSE_SEQS else self._linear_seconds(tokens)
        seconds += self._decode_part(decode_seqs, decode_kv_tokens)
        if prefill_tokens:
            beyond = self.beyond
            chunk = beyond.mixed_kv_s * decode_kv_tokens + beyond.per_context_s * prefill_context_tokens
            if prefill_tokens < RAMP_TOKENS:
                chunk *= prefill_tokens / RAMP_TOKENS
            seconds += chunk + self._attention_seconds(prefill_attention)
        return seconds

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """A step of decodes only: the steady state."""
        if not decode_seqs:
            return 0.0
        linear = self._few_tokens[decode_seqs] if decode_seqs <= _DENSE_SEQS else self._linear_seconds(decode_seqs)
        return linear + self._decode_part(decode_seqs, decode_kv_tokens)


def _scale(table_s: float, formula_s: float) -> float:
    return table_s / formula_s if table_s > 0.0 and formula_s > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class ScaledStepTime(_StepTime):
    """Another step time, corrected by one factor per regime.

    A decode-only step takes `decode_factor` times the base's prediction, a mixed one `mixed_factor` times it.
    Between them, so that step times stay continuous and non-decreasing: a greater mixed factor comes in over the
    first `RAMP_TOKENS` prefill tokens, and under a smaller one a mixed step still takes at least as long as its
    decodes alone.

    Raises:
        ValueError: a factor is not positive and finite.
    """

    base: StepTime
    decode_factor: float = 1.0
    mixed_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("decode_factor", self.decode_factor), ("mixed_factor", self.mixed_factor)):
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name} is {value!r}: a correction factor is positive and finite")

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`."""
        base_s = self.base.seconds_of(
            prefill_tokens,
            prefill_seqs,
            prefill_context_tokens,
            prefill_attention,
            decode_seqs,
            decode_kv_tokens,
        )
        decode, mixed = self.decode_factor, self.mixed_factor
        if not prefill_tokens:
            return decode * base_s
        if mixed >= decode:
            if prefill_tokens < RAMP_TOKENS:
                mixed = decode + (mixed - decode) * (prefill_tokens / RAMP_TOKENS)
            return mixed * base_s
        alone_s = decode * self.base.decode_seconds(decode_seqs, decode_kv_tokens)
        corrected_s = mixed * base_s
        return max(alone_s, corrected_s)

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """A step of decodes only: the steady state."""
        return self.decode_factor * self.base.decode_seconds(decode_seqs, decode_kv_tokens)


@dataclass(frozen=True, slots=True)
class ShiftedStepTime(_StepTime):
    """Another step time with more fixed time: every step that holds anything takes `extra_s` longer.

    Raises:
        ValueError: `extra_s` is negative (a step could then take no time) or not finite.
    """

    base: StepTime
    extra_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.extra_s) and self.extra_s >= 0.0):
            raise ValueError(f"extra_s is {self.extra_s!r}: it is a finite number of seconds >= 0")

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        """`seconds` without building a `Step`."""
        if not prefill_tokens and not decode_seqs:
            return 0.0
        return self.extra_s + self.base.seconds_of(
            prefill_tokens,
            prefill_seqs,
            prefill_context_tokens,
            prefill_attention,
            decode_seqs,
            decode_kv_tokens,
        )

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        """A step of decodes only: the steady state."""
        return self.extra_s + self.base.decode_seconds(decode_seqs, decode_kv_tokens) if decode_seqs else 0.0
