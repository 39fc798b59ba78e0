"""How long answers become: survival curves per (model, tier), learned online.

Kaplan and Meier's product-limit estimator (JASA 1958) on logarithmic buckets: of the answers that reached a
bucket, which share ended in it. Answers that are still running, were cancelled or hit their token limit are
censored: they count as having reached their length, and say nothing of where they would have ended; leaving them
out would make answers look shorter than they are. Old answers count less, with a half-life in answers. What other
replicas observed is added to one's own (`profiles.evidence`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from profiles.evidence import UNIT, LengthClass, LengthEvidence
from profiles.format import ProfileError

_PER_OCTAVE = 4
_LONGEST = 2**18
_HALF_LIFE = 500.0  # answers
_PRIOR_WEIGHT = 4.0  # answers that the starting point counts as
_PRIOR_MEAN_TOKENS = 256.0
_GROWN = 1e9  # rescale before weights leave the comfortable float range


def _bucket_edges() -> tuple[float, ...]:
    # Starts at zero, then every whole token, then four buckets an octave.
    edges = {0, 1, 2, 3, 4, 5, 6, 7, 8}
    octave = 8.0
    while octave < _LONGEST:
        edges.update(round(octave * 2 ** (i / _PER_OCTAVE)) for i in range(1, _PER_OCTAVE + 1))
        octave *= 2
    return tuple(float(edge) for edge in sorted(edges))


_EDGES = _bucket_edges()


@dataclass(frozen=True, slots=True)
class SurvivalLengths:
    """A snapshot: the share of answers longer than each edge, and the area under that curve to its right.

    Between edges the share falls in a straight line. Serves as the scheduler's length model.

    Attributes:
        survival: share of answers longer than the edge; starts at 1, ends at 0.
        tail_tokens: expected tokens beyond the edge per answer that began.
        answers: weight of what it rests on, in answers; 0 before anything was learned.
    """

    edges: tuple[float, ...]
    survival: tuple[float, ...]
    tail_tokens: tuple[float, ...]
    answers: float

    def remaining(self, generated_tokens: int) -> float:
        """Expected tokens still to come, given that `generated_tokens` came and the answer goes on; >= 1."""
        i, alive = self._locate(generated_tokens)
        if alive <= 0.0:
            return 1.0
        width = self.edges[i + 1] - generated_tokens
        ahead = self.tail_tokens[i + 1] + width * (alive + self.survival[i + 1]) / 2.0
        return max(ahead / alive, 1.0)

    def remaining_quantile(self, generated_tokens: int, quantile: float) -> float:
        """The same at a quantile in (0, 1): with this chance no more than that many tokens come; >= 1."""
        _, alive = self._locate(generated_tokens)
        if alive <= 0.0:
            return 1.0
        target = alive * (1.0 - quantile)
        # The shares fall, so their negatives rise, which is what bisection wants.
        j = bisect_left(self.survival, -target, key=_negated)
        if j >= len(self.survival):
            return max(self.edges[-1] - generated_tokens, 1.0)
        if j == 0:
            return 1.0
        high, low = self.survival[j - 1], self.survival[j]
        share = (high - target) / (high - low) if high > low else 1.0
        x = self.edges[j - 1] + share * (self.edges[j] - self.edges[j - 1])
        return max(x - generated_tokens, 1.0)

    def _locate(self, generated_tokens: int) -> tuple[int, float]:
        """The bucket of a length, and the share of answers longer than it."""
        edges = self.edges
        i = bisect_right(edges, generated_tokens) - 1
        if i >= len(edges) - 1:
            return len(edges) - 2, 0.0
        share = (generated_tokens - edges[i]) / (edges[i + 1] - edges[i])
        return i, self.survival[i] + share * (self.survival[i + 1] - self.survival[i])


def _negated(value: float) -> float:
    return -value


class _Counts(BaseModel):
    """One class's weights per bucket, newest at weight `unit`."""

    model_config = ConfigDict(extra="forbid")
    ended: list[float] = Field(min_length=len(_EDGES), max_length=len(_EDGES))
    censored: list[float] = Field(min_length=len(_EDGES), max_length=len(_EDGES))
    unit: float = Field(default=1.0, gt=0.0)

    @classmethod
    def empty(cls) -> _Counts:
        return cls(ended=[0.0] * len(_EDGES), censored=[0.0] * len(_EDGES))

    def add(self, tokens: int, finished: bool) -> None:
        bucket = _bucket(tokens)
        (self.ended if finished else self.censored)[bucket] += self.unit
        # Growing the newcomers' weight is the same as shrinking everybody's, at one multiplication.
        self.unit *= 2.0 ** (1.0 / _HALF_LIFE)
        if self.unit > _GROWN:
            self.ended = [value / self.unit for value in self.ended]
            self.censored = [value / self.unit for value in self.censored]
            self.unit = 1.0


def _bucket(tokens: int) -> int:
    """Bucket i holds lengths in (edge i-1, edge i]; an answer of no tokens is in bucket 1 with those of one."""
    return min(max(bisect_left(_EDGES, tokens), 1), len(_EDGES) - 1)


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: int
    classes: list[tuple[str, str | None, _Counts]]


class LengthBook:
    """Learns answer lengths for every (model, tier). Not thread-safe: one owner observes and takes snapshots.

    A class that has seen little leans on all tiers of its model together, and those on a heavy-tailed guess with
    a mean of 256 tokens.
    """

    def __init__(self) -> None:
        self._classes: dict[tuple[str, str | None], _Counts] = {}
        self._heard: dict[tuple[str, str | None], LengthClass] = {}

    def observe(self, model: str, tier: str, output_tokens: int, *, finished: bool) -> None:
        """An answer ended after `output_tokens`. `finished`: by itself, not cut by a limit or a client."""
        for key in ((model, tier), (model, None)):
            self._classes.setdefault(key, _Counts.empty()).add(output_tokens, finished)

    def snapshot(self, model: str, tier: str, running: Iterable[int] = ()) -> SurvivalLengths:
        """What is known of a class now; `running` are the tokens that its unfinished answers have so far."""
        pooled = _survive(*self._known(model, None), _GUESS)
        ended, left = self._known(model, tier)
        for tokens in running:
            left[_bucket(tokens)] += 1.0
        return _curve(*_survive(ended, left, pooled[0]))

    def _known(self, model: str, tier: str | None) -> tuple[list[float], list[float]]:
        """Weights of a class's answers by bucket, ended and censored: one's own and what was heard."""
        own, heard = self._classes.get((model, tier)), self._heard.get((model, tier))
        ended = [0.0] * len(_EDGES) if own is None else [value / own.unit for value in own.ended]
        left = [0.0] * len(_EDGES) if own is None else [value / own.unit for value in own.censored]
        if heard is not None:
            for weights, into in ((heard.ended, ended), (heard.censored, left)):
                for bucket, weight in weights.items():
                    into[bucket] += weight / UNIT
        return ended, left

    def evidence(self) -> LengthEvidence:
        """What was observed here, for other replicas; nothing of what was heard from them."""
        return LengthEvidence(
            buckets=len(_EDGES),
            classes=tuple(
                LengthClass(
                    model=model,
                    tier=tier,
                    ended=_sparse(counts.ended, counts.unit),
                    censored=_sparse(counts.censored, counts.unit),
                )
                for (model, tier), counts in sorted(self._classes.items(), key=_order)
            ),
        )

    def hear(self, others: Iterable[LengthEvidence]) -> set[tuple[str, str]]:
        """What each other replica has observed, in place of what was heard before. The classes that may have
        changed by it."""
        together = LengthEvidence.merge(len(_EDGES), others)
        before, self._heard = self._heard, {(one.model, one.tier): one for one in together.classes}
        changed = {key for key in before.keys() | self._heard.keys() if before.get(key) != self._heard.get(key)}
        models = {model for model, _ in changed}
        known = self._classes.keys() | self._heard.keys()
        return {(model, tier) for model, tier in known if tier is not None and model in models}

    def to_json(self) -> str:
        """What was learned, for `restore` in another process or replica."""
        classes = [(model, tier, counts) for (model, tier), counts in sorted(self._classes.items(), key=_order)]
        return _Saved(format=1, classes=classes).model_dump_json()

    def restore(self, text: str | bytes) -> None:
        """Replace what was learned by what `to_json` wrote. Raises ProfileError when it is not that."""
        try:
            saved = _Saved.model_validate_json(text)
        except ValidationError as error:
            raise ProfileError(f"not saved lengths: {error.errors(include_url=False)[0]['msg']}") from error
        if saved.format != 1:
            raise ProfileError(f"saved lengths have format {saved.format}; this version reads format 1")
        self._classes = {(model, tier): counts for model, tier, counts in saved.classes}


def _sparse(weights: list[float], unit: float) -> dict[int, int]:
    return {bucket: whole for bucket, weight in enumerate(weights) if (whole := round(weight / unit * UNIT))}


def _order(item: tuple[tuple[str, str | None], _Counts]) -> tuple[str, str]:
    return item[0][0], item[0][1] or ""


def _guess() -> tuple[float, ...]:
    """Lomax survival (shape 3): the longer an answer is, the more of it is still expected."""
    scale = 2.0 * _PRIOR_MEAN_TOKENS
    shares = [(1.0 + edge / scale) ** -3.0 for edge in _EDGES]
    return (*shares[:-1], 0.0)


_GUESS = _guess()


def _survive(ended: list[float], left: list[float], before: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """The product-limit curve over the edges, where `before` counts as `_PRIOR_WEIGHT` answers; and the weight."""
    size = len(_EDGES)
    weight = sum(ended)
    # Who left inside a bucket was there for about half of it.
    at_risk = [0.0] * size
    reached = 0.0
    for i in range(size - 1, 0, -1):
        at_risk[i] = reached + ended[i] + left[i] / 2.0
        reached += ended[i] + left[i]
    survival = [1.0]
    for i, (high, low) in enumerate(pairwise(before), start=1):
        dead = ended[i] + _PRIOR_WEIGHT * (high - low)
        there = at_risk[i] + _PRIOR_WEIGHT * high
        survival.append(survival[-1] * max(1.0 - dead / there, 0.0) if there > 0.0 else 0.0)
    survival[-1] = 0.0
    return tuple(survival), weight


def _curve(survival: tuple[float, ...], weight: float) -> SurvivalLengths:
    areas = [
        (right - left) * (high + low) / 2.0
        for (left, right), (high, low) in zip(pairwise(_EDGES), pairwise(survival), strict=True)
    ]
    tails = tuple(reversed(list(accumulate(reversed(areas), initial=0.0))))
    return SurvivalLengths(_EDGES, survival, tails, weight if math.isfinite(weight) else 0.0)
