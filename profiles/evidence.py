"""What was observed, in a form that adds up: weights per bin, as whole numbers.

Replicas tell each other this instead of results. A result (a median, a survival curve) cannot be taken apart
again, so one that was merged and told on would be counted twice; evidence of different observers is simply added.
Whole numbers make the sum exact, so it is the same in every order and grouping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

UNIT = 1000
"""A weight of one observation. Smaller weights, of old observations, are rounded to thousandths."""

_LARGEST_BIN = 10_000


Bins = dict[Annotated[int, Field(ge=-_LARGEST_BIN, le=_LARGEST_BIN)], NonNegativeInt]
"""Weights by bin, in `UNIT`."""


def merged(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The weights of all together."""
    total: Counter[int] = Counter()
    for part in parts:
        total.update(part)
    return {bin_: total[bin_] for bin_ in sorted(total) if total[bin_]}


def scaled(weights: Mapping[int, int], factor: float) -> dict[int, int]:
    """The same, worth less."""
    return {bin_: smaller for bin_, weight in weights.items() if (smaller := round(weight * factor))}


def binned(weighted: Iterable[tuple[float, float]], width: float) -> dict[int, int]:
    """Weights of (value, weight) by the bin of `width` in whose middle `value` is nearest."""
    total: dict[int, int] = {}
    for value, weight in weighted:
        bin_ = round(value / width)
        if not -_LARGEST_BIN <= bin_ <= _LARGEST_BIN:
            bin_ = _LARGEST_BIN if bin_ > 0 else -_LARGEST_BIN
        total[bin_] = total.get(bin_, 0) + round(weight * UNIT)
    return {bin_: total[bin_] for bin_ in sorted(total) if total[bin_]}


class RegimeEvidence(BaseModel):
    """Observations of one regime of step times.

    Attributes:
        log_ratios: weights by the logarithm of observed over predicted, in bins of `RATIO_WIDTH`.
        errors: weights by log(1 + relative error), in bins of `ERROR_WIDTH`.
        observations: how many there were, in thousandths where they are worth less.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    log_ratios: Bins = {}
    errors: Bins = {}
    observations: NonNegativeInt = 0

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The evidence of different observers together."""
        all_of_them = list(parts)
        return cls(
            log_ratios=merged(part.log_ratios for part in all_of_them),
            errors=merged(part.errors for part in all_of_them),
            observations=sum(part.observations for part in all_of_them),
        )

    def worth(self, factor: float) -> Self:
        """The same evidence, worth less."""
        return type(self)(
            log_ratios=scaled(self.log_ratios, factor),
            errors=scaled(self.errors, factor),
            observations=round(self.observations * factor),
        )


class StepEvidence(BaseModel):
    """Observations of one backend's step times, all relative to the same profile.

    Attributes:
        base: which profile: its predictions for two steps. Evidence of different bases is not comparable.
        steps: how many were seen, in thousandths.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    decode: RegimeEvidence = RegimeEvidence()
    mixed: RegimeEvidence = RegimeEvidence()
    steps: NonNegativeInt = 0

    @classmethod
    def merge(cls, base: str, parts: Iterable[Self]) -> Self:
        """The evidence of different observers for the profile `base`; that for other profiles is left out."""
        same = [part for part in parts if part.base == base]
        return cls(
            base=base,
            decode=RegimeEvidence.merge(part.decode for part in same),
            mixed=RegimeEvidence.merge(part.mixed for part in same),
            steps=sum(part.steps for part in same),
        )

    def worth(self, factor: float) -> Self:
        """The same evidence, worth less."""
        return type(self)(
            base=self.base,
            decode=self.decode.worth(factor),
            mixed=self.mixed.worth(factor),
            steps=round(self.steps * factor),
        )


class LengthClass(BaseModel):
    """Answers of one (model, tier); `tier` None: of all tiers. Weights by length bucket (`profiles.lengths`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    tier: str | None = None
    ended: Bins = {}
    censored: Bins = {}


class LengthEvidence(BaseModel):
    """Observed answer lengths. `buckets`: how many length buckets there are where this was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    buckets: int
    classes: tuple[LengthClass, ...] = ()

    @model_validator(mode="after")
    def _bins_are_buckets(self) -> Self:
        for one in self.classes:
            if any(not 0 <= bucket < self.buckets for weights in (one.ended, one.censored) for bucket in weights):
                raise ValueError(f"{one.model}, {one.tier}: a length in a bucket that there is not")
        return self

    @classmethod
    def merge(cls, buckets: int, parts: Iterable[Self]) -> Self:
        """The evidence of different observers; that in other buckets is left out."""
        found: dict[tuple[str, str | None], list[LengthClass]] = {}
        for part in parts:
            if part.buckets == buckets:
                for one in part.classes:
                    found.setdefault((one.model, one.tier), []).append(one)
        return cls(
            buckets=buckets,
            classes=tuple(
                LengthClass(
                    model=model,
                    tier=tier,
                    ended=merged(one.ended for one in same),
                    censored=merged(one.censored for one in same),
                )
                for (model, tier), same in sorted(found.items(), key=_order)
            ),
        )

    def worth(self, factor: float) -> Self:
        """The same evidence, worth less."""
        return type(self)(
            buckets=self.buckets,
            classes=tuple(
                one.model_copy(
                    update={"ended": scaled(one.ended, factor), "censored": scaled(one.censored, factor)}
                )
                for one in self.classes
            ),
        )


def _order(item: tuple[tuple[str, str | None], list[LengthClass]]) -> tuple[str, bool, str]:
    (model, tier), _ = item
    return model, tier is not None, tier or ""
