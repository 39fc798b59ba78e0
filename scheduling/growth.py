"""How the KV of a backend rises and falls until its last resident has ended (PolyServe §4.5 simulates future
iterations for the same number).

Residents are sorted by what they have left. Just before the j-th ends (after e_j more steps) the KV is the sum
over i >= j of (kv_i + seqs_i * e_j). With the sums from the end kept, a newcomer costs a search and two maxima,
and one who joins or leaves moves a stretch of each array.

While everybody decodes in lockstep as expected, the curve does not change: what they have left falls by as much as
their KV has grown. So it is not drawn anew for every token, only moved (`shift`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from scheduling.residents import Resident

_FIRST_SIZE = 64


class GrowthCurve:
    """The curve of one backend. `peak_tokens` is its peak, reached `peak_after_tokens` steps from when it was
    drawn. `foreign_tokens` are the KV of other replicas, which stay."""

    __slots__ = (
        "_ends",
        "_late",
        "_maxima_known",
        "_peaks",
        "_remaining",
        "_shift",
        "_soon",
        "_suffix_kv",
        "_suffix_seqs",
        "peak_after_tokens",
        "peak_tokens",
    )

    def __init__(self) -> None:
        self._remaining: list[float] = []  # searched; `_ends` are the same numbers to reckon with
        # Arrays are longer than the residents are many, so that one more is no new array.
        self._ends = _zeros(_FIRST_SIZE)
        self._suffix_kv = _zeros(_FIRST_SIZE)
        self._suffix_seqs = _zeros(_FIRST_SIZE)
        self._peaks = _zeros(_FIRST_SIZE)
        # Maxima of the peaks from a place on, and of the peaks with their steps up to a place: for newcomers.
        self._late = _zeros(_FIRST_SIZE)
        self._soon = _zeros(_FIRST_SIZE)
        self.clear(0)

    def clear(self, foreign_tokens: int) -> None:
        """Nobody is here but other replicas' residents."""
        self._shift = 0.0  # steps since it was drawn; the arrays are as of then
        self._remaining = []
        self._suffix_kv[0] = foreign_tokens
        self._suffix_seqs[0] = 0.0
        self._maxima_known = True
        self.peak_tokens = foreign_tokens
        self.peak_after_tokens = 0.0

    def draw(self, residents: Collection[Resident], foreign_tokens: int) -> None:
        """Anew, from at least one resident."""
        self._shift = 0.0
        for resident in residents:
            resident.drawn_remaining_tokens = resident.remaining_tokens
            resident.drawn_kv_tokens = float(resident.kv_tokens)
        count = len(residents)
        self._make_room(count)
        ends = np.array([resident.remaining_tokens for resident in residents])
        falling = np.argsort(ends, kind="stable")[::-1]
        sums = np.empty((2, count + 1))
        sums[:, 0] = foreign_tokens, 0.0
        sums[0, 1:] = np.array([resident.drawn_kv_tokens for resident in residents])[falling]
        sums[1, 1:] = np.array([resident.sequences for resident in residents])[falling]
        sums = sums.cumsum(axis=1)[:, ::-1]
        self._suffix_kv[: count + 1] = sums[0]
        self._suffix_seqs[: count + 1] = sums[1]
        ends = ends[falling][::-1]
        self._ends[:count] = ends
        self._remaining = ends.tolist()
        self._find_peak()

    def _make_room(self, count: int) -> None:
        """For so many residents: the sums have one place more, that of nobody."""
        size = len(self._ends)
        if count < size:
            return
        more = max(count + 1, 2 * size) - size
        self._ends = np.concatenate([self._ends, _zeros(more)])
        self._suffix_kv = np.concatenate([self._suffix_kv, _zeros(more)])
        self._suffix_seqs = np.concatenate([self._suffix_seqs, _zeros(more)])
        self._peaks = _zeros(size + more)
        self._late = _zeros(size + more)
        self._soon = _zeros(size + more)

    def shift(self, steps: float) -> float:
        """Everybody has made so many tokens more. Returns how many since the curve was drawn."""
        self._shift += steps
        self.peak_after_tokens = max(self.peak_after_tokens - steps, 0.0)
        return self._shift

    def enter(self, newcomer: Resident) -> None:
        """Note how a newcomer stands, in the curve's own terms, until it is asked to `join`."""
        newcomer.drawn_remaining_tokens = newcomer.remaining_tokens + self._shift
        newcomer.drawn_kv_tokens = newcomer.kv_tokens - newcomer.sequences * self._shift

    def join(self, newcomer: Resident) -> None:
        """One more, without sorting anew; see `enter`."""
        left, tokens = newcomer.drawn_remaining_tokens, newcomer.drawn_kv_tokens
        count = len(self._remaining)
        self._make_room(count + 1)
        at = bisect_right(self._remaining, left)
        self._remaining.insert(at, left)
        ends, kv, seqs = self._ends, self._suffix_kv, self._suffix_seqs
        ends[at + 1 : count + 1] = ends[at:count]
        ends[at] = left
        kv[at + 1 : count + 2] = kv[at : count + 1]
        seqs[at + 1 : count + 2] = seqs[at : count + 1]
        kv_before, seqs_before = kv[: at + 1], seqs[: at + 1]
        kv_before += tokens
        seqs_before += newcomer.sequences
        self._find_peak()

    def leave(self, gone: Resident, foreign_tokens: int) -> None:
        """One less. Among residents with equally much left the last place is taken out: the sums at the first of
        them, where their common peak is, stay right."""
        remaining = self._remaining
        at = bisect_right(remaining, gone.drawn_remaining_tokens) - 1
        del remaining[at]
        if not remaining:
            self.clear(foreign_tokens)
            return
        count = len(remaining)
        ends, kv, seqs = self._ends, self._suffix_kv, self._suffix_seqs
        ends[at:count] = ends[at + 1 : count + 1]
        kv[at : count + 1] = kv[at + 1 : count + 2]
        seqs[at : count + 1] = seqs[at + 1 : count + 2]
        kv_before, seqs_before = kv[:at], seqs[:at]
        kv_before -= gone.drawn_kv_tokens
        seqs_before -= gone.sequences
        self._find_peak()

    def add_foreign(self, tokens: int) -> None:
        """Other replicas' residents hold so many more, or less; at least one resident is here."""
        everybody = self._suffix_kv[: len(self._remaining) + 1]
        everybody += tokens
        self._find_peak()

    def _find_peak(self) -> None:
        count = len(self._remaining)
        peaks = self._peaks[:count]
        np.multiply(self._suffix_seqs[:count], self._ends[:count], out=peaks)
        peaks += self._suffix_kv[:count]
        place = int(peaks.argmax())
        self._maxima_known = False
        self.peak_tokens = math.ceil(peaks.item(place))
        self.peak_after_tokens = max(self._remaining[place] - self._shift, 0.0)

    def _find_maxima(self) -> None:
        count = len(self._remaining)
        peaks, soon = self._peaks[:count], self._soon[:count]
        np.maximum.accumulate(peaks[::-1], out=self._late[:count][::-1])
        np.add(peaks, self._ends[:count], out=soon)
        np.maximum.accumulate(soon, out=soon)
        self._maxima_known = True

    def peak_with(self, prompt_tokens: int, output_tokens: float, sequences: int) -> int:
        """The peak if a newcomer joins: it holds its prompt from the start, grows by one token a step and leaves
        after `output_tokens`."""
        if not self._maxima_known:
            self._find_maxima()
        shift = self._shift
        end = output_tokens + shift
        remaining = self._remaining
        at = bisect_right(remaining, end)
        base = prompt_tokens * sequences
        others = float(self._suffix_kv.item(at)) + float(self._suffix_seqs.item(at)) * end
        peak = others + base + output_tokens * sequences
        if at < len(remaining):
            peak = max(peak, float(self._late.item(at)))
        if at:
            # those who end before it: it has grown by one token a step until then
            earlier = float(self._soon.item(at - 1)) - shift + base
            if sequences > 1:
                earlier += (sequences - 1) * (remaining[at - 1] - shift)
            peak = max(peak, earlier)
        return math.ceil(peak)

    def first_end_tokens(self) -> float | None:
        """Steps until the first resident is expected to end; None when there is none."""
        return max(self._remaining[0] - self._shift, 1.0) if self._remaining else None


def _zeros(size: int) -> npt.NDArray[np.float64]:
    return np.zeros(size)
