"""What one run came to, read from the files its commands wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import BaseModel, ConfigDict


class _File(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Tier(_File):
    tier: str
    offered: int
    promised: int
    attained: int
    refused: int
    output_tokens: int


class _Score(_File):
    tiers: tuple[_Tier, ...]
    overall: _Tier
    measured_s: float


class _Prediction(_File):
    count: int
    p50: float | None
    p90: float | None


class _Predictions(_File):
    ttft: _Prediction
    tpot: _Prediction


class _Timekeeping(_File):
    lateness_p99_s: float | None
    lateness_max_s: float | None
    loop_lag_p99_s: float | None


class BenchFile(_File):
    """The part of `tiergate bench --json` that a comparison needs."""

    score: _Score
    predictions: _Predictions
    timekeeping: _Timekeeping
    wall_s: float

    @classmethod
    def read(cls, path: Path) -> BenchFile:
        return cls.model_validate(orjson.loads(path.read_bytes()))


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One policy under one seed. `backend_seconds` counts backends while they belong to a tier; a policy
    without tiers has all of them all the time."""

    policy: str
    seed: int
    bench: BenchFile
    backend_seconds: float
    gateway_lag_s: float | None

    @property
    def attainment(self) -> float:
        overall = self.bench.score.overall
        return overall.attained / overall.promised if overall.promised else 0.0

    def tier_attainment(self, tier: str) -> float | None:
        for item in self.bench.score.tiers:
            if item.tier == tier and item.promised:
                return item.attained / item.promised
        return None


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, smallest and largest over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(sum(values) / len(values), min(values), max(values)) if values else None
