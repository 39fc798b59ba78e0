"""How the KV of a backend rises and falls until its last resident has ended (PolyServe §4.5 simulates future
iterations for the same number).

Residents are sorted by what they have left. Just before the j-th ends (after e_j more steps) the KV is the sum
over i >= j of (kv_i + seqs_i * e_j). With the sums from the end kept, a newcomer costs a search and two maxima,
and one who joins or leaves moves a stretch of each list.

While everybody decodes in lockstep as expected, the curve does not change: what they have left falls by as much as
their KV has grown. So it is not drawn anew for every token, only moved (`shift`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from itertools import accumulate
from operator import add, attrgetter

from scheduling.residents import Resident

_BY_REMAINING = attrgetter("remaining_tokens")


class GrowthCurve:
    """The curve of one backend. `peak_tokens` is its peak, reached `peak_after_tokens` steps from when it was
    drawn. `foreign_tokens` are the KV of other replicas, which stay."""

    __slots__ = (
        "_peaks",
        "_peaks_and_steps",
        "_remaining",
        "_shift",
        "_suffix_kv",
        "_suffix_seqs",
        "peak_after_tokens",
        "peak_tokens",
    )

    def __init__(self) -> None:
        self.clear(0)

    def clear(self, foreign_tokens: int) -> None:
        """Nobody is here but other replicas' residents."""
        self._shift = 0.0  # steps since it was drawn; the lists are as of then
        self._remaining: list[float] = []
        self._suffix_kv: list[float] = [float(foreign_tokens)]
        self._suffix_seqs: list[int] = [0]
        self._peaks: list[float] = []
        self._peaks_and_steps: list[float] = []
        self.peak_tokens = foreign_tokens
        self.peak_after_tokens = 0.0

    def draw(self, residents: Collection[Resident], foreign_tokens: int) -> None:
        """Anew, from at least one resident."""
        self._shift = 0.0
        order = sorted(residents, key=_BY_REMAINING)
        for resident in order:
            resident.drawn_remaining_tokens = resident.remaining_tokens
            resident.drawn_kv_tokens = float(resident.kv_tokens)
        falling = order[::-1]
        suffix_kv = list(accumulate([r.kv_tokens for r in falling], initial=float(foreign_tokens)))
        suffix_seqs = list(accumulate([r.sequences for r in falling], initial=0))
        suffix_kv.reverse()
        suffix_seqs.reverse()
        self._take([r.remaining_tokens for r in order], suffix_kv, suffix_seqs)

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
        left, tokens, count = newcomer.drawn_remaining_tokens, newcomer.drawn_kv_tokens, newcomer.sequences
        at = bisect_right(self._remaining, left)
        kv, seqs = self._suffix_kv, self._suffix_seqs
        self._take(
            [*self._remaining[:at], left, *self._remaining[at:]],
            [*[each + tokens for each in kv[: at + 1]], *kv[at:]],
            [*[each + count for each in seqs[: at + 1]], *seqs[at:]],
        )

    def leave(self, gone: Resident, foreign_tokens: int) -> None:
        """One less. Among residents with equally much left the last place is taken out: the sums at the first of
        them, where their common peak is, stay right."""
        left, tokens, count = gone.drawn_remaining_tokens, gone.drawn_kv_tokens, gone.sequences
        at = bisect_right(self._remaining, left) - 1
        kv, seqs = self._suffix_kv, self._suffix_seqs
        remaining = self._remaining[:at] + self._remaining[at + 1 :]
        if not remaining:
            self.clear(foreign_tokens)
            return
        self._take(
            remaining,
            [each - tokens for each in kv[:at]] + kv[at + 1 :],
            [each - count for each in seqs[:at]] + seqs[at + 1 :],
        )

    def _take(self, remaining: list[float], suffix_kv: list[float], suffix_seqs: list[int]) -> None:
        peaks = [kv + n * e for kv, n, e in zip(suffix_kv, suffix_seqs, remaining, strict=False)]
        self._remaining = remaining
        self._suffix_kv = suffix_kv
        self._suffix_seqs = suffix_seqs
        self._peaks = peaks
        self._peaks_and_steps = list(map(add, peaks, remaining))
        peak = max(peaks)
        self.peak_tokens = math.ceil(peak)
        self.peak_after_tokens = max(remaining[peaks.index(peak)] - self._shift, 0.0)

    def peak_with(self, prompt_tokens: int, output_tokens: float, sequences: int) -> int:
        """The peak if a newcomer joins: it holds its prompt from the start, grows by one token a step and leaves
        after `output_tokens`."""
        shift = self._shift
        end = output_tokens + shift
        at = bisect_right(self._remaining, end)
        base = prompt_tokens * sequences
        own_end = self._suffix_kv[at] + self._suffix_seqs[at] * end + base + output_tokens * sequences
        peak = max(own_end, max(self._peaks[at:], default=0.0))
        if at:
            # those who end before it: it has grown by one token a step until then
            earlier = max(self._peaks_and_steps[:at]) - shift + base
            if sequences > 1:
                earlier += (sequences - 1) * (self._remaining[at - 1] - shift)
            peak = max(peak, earlier)
        return math.ceil(peak)

    def first_end_tokens(self) -> float | None:
        """Steps until the first resident is expected to end; None when there is none."""
        return max(self._remaining[0] - self._shift, 1.0) if self._remaining else None
