"""Measured functions of one and two arguments: non-decreasing, straight between their points."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field


def _rising(name: str, values: tuple[float, ...], strictly: bool) -> None:
    previous = -math.inf
    for index, value in enumerate(values):
        if not math.isfinite(value) or value < previous or (strictly and value == previous):
            kind = "rise" if strictly else "not fall"
            raise ValueError(
                f"{name}[{index}] is {value!r} after {previous!r}: the values must be finite and {kind}"
            )
        previous = value


@dataclass(frozen=True, slots=True)
class Curve:
    """A measured, non-decreasing function of one argument: straight between its points.

    Raises:
        ValueError: an axis that does not rise or values that fall, with the place.
    """

    axis: tuple[float, ...]
    values_s: tuple[float, ...]
    _slopes: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        if len(self.axis) < 2 or len(self.axis) != len(self.values_s):
            raise ValueError(
                f"a curve needs two points or more: {len(self.axis)} on the axis, {len(self.values_s)} values"
            )
        _rising("axis", self.axis, strictly=True)
        _rising("values_s", self.values_s, strictly=False)
        slopes = tuple(
            (v1 - v0) / (x1 - x0)
            for x0, x1, v0, v1 in zip(self.axis, self.axis[1:], self.values_s, self.values_s[1:], strict=False)
        )
        object.__setattr__(self, "_slopes", slopes)

    def at(self, x: float) -> float:
        """The value at `x`; the edge's value outside."""
        axis = self.axis
        if x <= axis[0]:
            return self.values_s[0]
        i = bisect_right(axis, x) - 1
        if i >= len(self._slopes):
            return self.values_s[-1]
        return self.values_s[i] + self._slopes[i] * (x - axis[i])


@dataclass(frozen=True, slots=True)
class Surface:
    """A measured function of two arguments, non-decreasing in both: bilinear between its points.

    ``rows_s[i][j]`` belongs to ``row_axis[i]`` and ``column_axis[j]``.

    Raises:
        ValueError: an axis that does not rise, a ragged row, or values that fall, with the place.
    """

    row_axis: tuple[float, ...]
    column_axis: tuple[float, ...]
    rows_s: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.row_axis) < 2 or len(self.column_axis) < 2:
            raise ValueError("a surface needs two rows and two columns or more")
        if len(self.rows_s) != len(self.row_axis):
            raise ValueError(f"rows_s has {len(self.rows_s)} rows for {len(self.row_axis)} points on row_axis")
        _rising("row_axis", self.row_axis, strictly=True)
        _rising("column_axis", self.column_axis, strictly=True)
        for i, row in enumerate(self.rows_s):
            if len(row) != len(self.column_axis):
                raise ValueError(f"rows_s[{i}] has {len(row)} values for {len(self.column_axis)} points")
            _rising(f"rows_s[{i}]", row, strictly=False)
        for j in range(len(self.column_axis)):
            _rising(f"column {j} of rows_s", tuple(row[j] for row in self.rows_s), strictly=False)

    def at(self, row: float, column: float) -> float:
        """The value at (`row`, `column`); each argument is held at the edge outside."""
        rows, columns = self.row_axis, self.column_axis
        row = min(max(row, rows[0]), rows[-1])
        column = min(max(column, columns[0]), columns[-1])
        i = min(bisect_right(rows, row), len(rows) - 1) - 1
        j = min(bisect_right(columns, column), len(columns) - 1) - 1
        across = (column - columns[j]) / (columns[j + 1] - columns[j])
        lower, upper = self.rows_s[i], self.rows_s[i + 1]
        low = lower[j] + across * (lower[j + 1] - lower[j])
        high = upper[j] + across * (upper[j + 1] - upper[j])
        return low + (row - rows[i]) / (rows[i + 1] - rows[i]) * (high - low)
