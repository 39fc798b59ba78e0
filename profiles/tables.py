"""From rows of measured kernels to the tables of a profile.

A step is taken apart as `tiergate_engine.steptime.TableStepTime` puts it together: linear layers over the
number of tokens, decode attention over (decodes, their contexts' sum), chunk attention over its area. The first
two are read off the rows; the third, and the two mixed-step costs, are fitted with piecewise linear,
non-decreasing functions (NNLS over ramps between knots).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from scipy.optimize import isotonic_regression, nnls

from profiles.fit import Floats, Observation, fit_roofline
from profiles.format import Coefficients, CurveTable, DecodeTable, Tables
from tiergate_engine.curves import Curve, Surface
from tiergate_engine.step import Step
from tiergate_engine.steptime import RooflineStepTime, TableStepTime

_AREA_KNOTS = tuple(float(4**i) for i in range(5, 14))  # 1 k to 67 M query-key pairs
_GUESS_WEIGHT = 1e-3  # of a cell outside the measured range against a measured one


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One composed step: `seqs` decodes of equal context beside one chunk, and its parts' kernel times."""

    chunk_tokens: int
    context_tokens: int
    seqs: int
    kv_per_seq: int
    linear_s: float
    attention_s: float
    total_s: float

    @property
    def step(self) -> Step:
        chunk = Step.chunk(self.chunk_tokens, self.context_tokens) if self.chunk_tokens else Step()
        return chunk + Step.decode(self.seqs, self.seqs * self.kv_per_seq)


@dataclass(frozen=True, slots=True)
class FittedTables:
    """Tables of kernel times and the formula around them; host time is in neither."""

    tables: Tables
    formula: RooflineStepTime

    def step_time(self) -> TableStepTime:
        tables = self.tables
        attention = tables.attention
        return TableStepTime(
            Curve(tables.tokens.axis, tables.tokens.seconds),
            Surface(tables.decode.seqs, tables.decode.kv_tokens, tables.decode.seconds),
            None if attention is None else Curve(attention.axis, attention.seconds),
            self.formula,
        )

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients.of(self.formula)


def fit_tables(rows: Sequence[KernelRow], kv_limit: int) -> FittedTables:
    """Tables over the rows' own grid, up to `kv_limit` KV tokens. Deterministic.

    Raises:
        ValueError: no decode-only or no prefill-only rows.
    """
    decode_rows = [row for row in rows if not row.chunk_tokens]
    if not decode_rows or not any(not row.seqs for row in rows):
        raise ValueError("tables need decode-only and prefill-only rows")
    formula = fit_roofline([Observation(row.step, row.total_s) for row in rows])
    tokens = _token_curve(rows)
    decode = _decode_table(decode_rows, tokens, kv_limit)
    surface = Surface(decode.seqs, decode.kv_tokens, decode.seconds)
    mixed_kv_s, per_context_s, attention = _chunk_parts([r for r in rows if r.chunk_tokens], tokens, surface)
    tables = Tables(
        tokens=CurveTable(axis=tokens.axis, seconds=tokens.values_s), decode=decode, attention=attention
    )
    return FittedTables(tables, replace(formula, mixed_kv_s=mixed_kv_s, per_context_s=per_context_s))


def rising(values: Iterable[float]) -> tuple[float, ...]:
    """The values with every fall levelled out (running maximum), rounded to what a file keeps."""
    return tuple(float(f"{value:.5g}") for value in np.maximum.accumulate(np.fromiter(values, np.float64)))


def _token_curve(rows: Sequence[KernelRow]) -> Curve:
    by_tokens: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if not row.seqs or (not row.chunk_tokens and row.seqs == 1):
            by_tokens[row.chunk_tokens + row.seqs].append(row.total_s - row.attention_s)
    axis = sorted(by_tokens)
    return Curve(tuple(float(t) for t in axis), rising(max(float(np.median(by_tokens[t])), 0.0) for t in axis))


def _decode_table(rows: Sequence[KernelRow], tokens: Curve, kv_limit: int) -> DecodeTable:
    by_seqs: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        by_seqs[row.seqs].append((float(row.seqs * row.kv_per_seq), row.total_s - tokens.at(row.seqs)))
    seqs = [n for n in sorted(by_seqs) if len(by_seqs[n]) >= 2]
    columns = np.array([0.0, *(kv_limit / 2**i for i in range(9, -1, -1))])
    table, weights = np.zeros((len(seqs), len(columns))), np.ones((len(seqs), len(columns)))
    for i, n in reversed(list(enumerate(seqs))):
        points = sorted(by_seqs[n])
        kv = np.array([point[0] for point in points])
        extra = np.maximum.accumulate(np.array([max(point[1], 0.0) for point in points]))
        table[i] = np.interp(columns, kv, extra)
        below, above = columns < kv[0], columns > kv[-1]
        table[i, below] -= (extra[1] - extra[0]) / (kv[1] - kv[0]) * (kv[0] - columns[below])
        if i + 1 < len(seqs):
            # Fewer, longer sequences than were timed: take what more sequences with as much KV cost.
            table[i, above] = np.maximum(table[i + 1, above], extra[-1])
        else:
            slope = (extra[-1] - extra[0]) / (kv[-1] - kv[0])
            table[i, above] += slope * (columns[above] - kv[-1])
        weights[i, below | above] = _GUESS_WEIGHT
    table = np.maximum(table, 0.0)
    for j in range(len(columns)):
        table[:, j] = isotonic_regression(table[:, j], weights=weights[:, j]).x
    # Levelling each row keeps rows ordered among each other: a running maximum keeps order.
    rows_s = tuple(rising(row) for row in [np.zeros(len(columns)), *table])
    return DecodeTable(seqs=(0.0, *map(float, seqs)), kv_tokens=tuple(map(float, columns)), seconds=rows_s)


def _chunk_parts(rows: Sequence[KernelRow], tokens: Curve, decode: Surface) -> tuple[float, float, CurveTable]:
    steps = [row.step for row in rows]
    total = np.array([row.total_s for row in rows])
    known = np.array(
        [tokens.at(s.tokens) + decode.at(s.decode_seqs, s.decode_kv_tokens) for s in steps], dtype=np.float64
    )
    area = np.array([s.prefill_attention for s in steps])
    knots = np.array([0.0, *_AREA_KNOTS])
    knots = knots[: int(np.searchsorted(knots, area.max())) + 1]
    ramps = [np.clip(area - low, 0.0, high - low) for low, high in pairwise(knots)]
    columns: Floats = np.column_stack(
        [[s.decode_kv_tokens for s in steps], [s.prefill_context_tokens for s in steps], *ramps]
    ).astype(np.float64)
    scaled = columns / total[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0.0] = 1.0
    # What the known parts overshoot cannot be taken back: no part may be negative.
    solution, _ = nnls(scaled / norms, np.maximum(total - known, 0.0) / total)
    values = solution / norms
    rises = np.concatenate([[0.0], np.cumsum(values[2:] * np.diff(knots))])
    curve = CurveTable(axis=tuple(map(float, knots)), seconds=rising(rises))
    return float(values[0]), float(values[1]), curve
