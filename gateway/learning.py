"""What the gateway learns while it serves, and keeps: step times per backend, answer lengths, prompt ratios."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters import registry
from adapters.contract import Adapter, Capabilities
from gateway.config import BackendSettings, EngineKind
from gateway.pace import PrefillSample, StepSample
from gateway.teachers import BackendUnusable, Running, StepLearner, Timing
from gateway.tokens import TokenCounter
from profiles import Limits, Profile, ProfileError, load, prior
from profiles.correct import CorrectedProfile, Corrector
from profiles.evidence import LengthEvidence, StepEvidence
from profiles.lengths import LengthBook
from scheduling.backends import EngineLimits
from scheduling.lengths import LengthModel
from tiergate_engine.step import Step


class Saved(BaseModel):
    """The file of what was learned. Corrections and lengths are the learners' own JSON.

    `source` names who observed it: under this name it is shared, before a restart and after it, so that no
    observation counts twice.
    """

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    source: str = Field(default_factory=lambda: secrets.token_hex(8), min_length=1, max_length=64)
    corrections: dict[str, str] = {}
    lengths: str | None = None
    chars_per_token: dict[str, float] = {}


class Evidence(BaseModel):
    """What one source observed, for other replicas; nothing of what it heard from them."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    steps: dict[str, StepEvidence] = {}
    lengths: LengthEvidence | None = None
    chars_per_token: dict[str, Annotated[float, Field(gt=0.1, lt=100)]] = {}

    def worth(self, factor: float) -> Evidence:
        """The same evidence, worth less."""
        return Evidence(
            steps={name: steps.worth(factor) for name, steps in self.steps.items()},
            lengths=None if self.lengths is None else self.lengths.worth(factor),
            chars_per_token=self.chars_per_token,
        )


@dataclass(frozen=True, slots=True)
class Heard:
    """What all other sources observed, taken together.

    Attributes:
        steps: by backend; one for each profile that it was observed against.
        chars_per_token: by model, the median of what they found.
    """

    steps: Mapping[str, tuple[StepEvidence, ...]] = field(default_factory=dict)
    lengths: tuple[LengthEvidence, ...] = ()
    chars_per_token: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, others: Iterable[Evidence]) -> Heard:
        """Takes a while for many sources; needs no event loop."""
        steps: dict[str, dict[str, list[StepEvidence]]] = {}
        lengths: dict[int, list[LengthEvidence]] = {}
        ratios: dict[str, list[float]] = {}
        for other in others:
            for backend, observed in other.steps.items():
                steps.setdefault(backend, {}).setdefault(observed.base, []).append(observed)
            if other.lengths is not None:
                lengths.setdefault(other.lengths.buckets, []).append(other.lengths)
            for model, ratio in other.chars_per_token.items():
                ratios.setdefault(model, []).append(ratio)
        return cls(
            {
                backend: tuple(StepEvidence.merge(base, same) for base, same in sorted(by_base.items()))
                for backend, by_base in steps.items()
            },
            tuple(LengthEvidence.merge(buckets, same) for buckets, same in sorted(lengths.items())),
            {model: median(found) for model, found in ratios.items()},
        )


class ProfiledSteps:
    """One backend's profile, corrected by what its streams show."""

    def __init__(self, profile: Profile, *, measured: bool, chunk_tokens: int | None) -> None:
        limits = profile.limits
        self._limits = EngineLimits(
            limits.max_running_seqs,
            limits.max_batched_tokens,
            limits.kv_tokens,
            limits.max_model_tokens,
            limits.block_tokens,
        )
        self.corrector = Corrector(
            profile.step_time,
            measured=measured,
            p90_error=profile.p90_error,
            chunk_tokens=chunk_tokens or limits.max_batched_tokens,
        )
        self._timing = self._of(self.corrector.snapshot())
        self._seen = 0
        self._looked = 0

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def observe(self, sample: StepSample) -> None:
        self.corrector.observe_decode(sample.decode_seqs, sample.decode_kv_tokens, sample.step_s, sample.steps)
        self._seen += 1

    def observe_prefill(self, sample: PrefillSample) -> None:
        self.corrector.observe_prefill(
            sample.prompt_tokens, sample.decode_seqs, sample.decode_kv_tokens, sample.seconds
        )
        self._seen += 1

    def observe_told(self, steps: Sequence[tuple[Step, float]], of: int) -> None:
        self.corrector.observe_told(steps, of)
        self._seen += 1

    def timing(self) -> Timing:
        """A new one only when something was seen since the last."""
        if self._seen != self._looked:
            self._looked = self._seen
            self._timing = self._of(self.corrector.snapshot())
        return self._timing

    def restore(self, text: str) -> None:
        """What an earlier run learned of this backend. Raises ProfileError."""
        self.corrector.restore(text)
        self._timing = self._of(self.corrector.snapshot())

    def hear(self, others: Iterable[StepEvidence]) -> None:
        """What each other replica has observed of this backend."""
        self.corrector.hear(others)
        self._seen += 1

    @staticmethod
    def _of(known: CorrectedProfile) -> Timing:
        return Timing(known.step_time, 1.0 + known.p90_error, known.calibrated, known.version, known.p90_error)


class Lengths:
    """Answer lengths per model and tier."""

    def __init__(self) -> None:
        self.book = LengthBook()
        self._dirty: set[tuple[str, str]] = set()

    def observe(self, model: str, tier: str, output_tokens: int, *, complete: bool) -> None:
        self.book.observe(model, tier, output_tokens, finished=complete)
        self._dirty.add((model, tier))

    def changed(self, running: Running) -> list[tuple[str, str, LengthModel]]:
        """Classes in which an answer ended, or one goes on."""
        changed, self._dirty = self._dirty | running.keys(), set(running)
        return [
            (model, tier, self.book.snapshot(model, tier, running.get((model, tier), ())))
            for model, tier in sorted(changed)
        ]

    def restore(self, text: str) -> None:
        """What an earlier run learned. Raises ProfileError."""
        self.book.restore(text)

    def hear(self, others: Iterable[LengthEvidence]) -> None:
        """What each other replica has observed."""
        self._dirty |= self.book.hear(others)


class Learned:
    """Makes what backends need, saves what was learned (`gateway.fleet.Teachers`), and tells it to others."""

    def __init__(self, counter: TokenCounter, path: Path | None, *, owns_file: bool = True) -> None:
        """`owns_file`: False where another process of the same store saves the file; it is then left alone, and
        what is in it is heard from that one. Raises OSError, ValidationError or ProfileError for a file that is
        there and cannot be used."""
        self._counter = counter
        self._path = path if owns_file else None
        self._lengths = Lengths()
        self._steps: dict[str, ProfiledSteps] = {}
        self._heard = Heard()
        self._saved = Saved()
        if self._path is not None and self._path.exists():
            self._saved = Saved.model_validate_json(self._path.read_bytes())
            counter.restore(self._saved.chars_per_token)
            if self._saved.lengths is not None:
                self._lengths.restore(self._saved.lengths)

    @property
    def counter(self) -> TokenCounter:
        return self._counter

    @property
    def source(self) -> str:
        """The name under which it tells what it observed."""
        return self._saved.source

    @property
    def lengths(self) -> Lengths:
        return self._lengths

    async def connect(self, settings: BackendSettings) -> Adapter:
        options = registry.AdapterOptions(
            api_key=None if settings.api_key is None else settings.api_key.get_secret_value()
        )
        try:
            if settings.engine is EngineKind.AUTO:
                return await registry.detect(settings.url, options)
            return registry.make(settings.engine.value, settings.url, options)
        except ValueError as error:
            raise BackendUnusable(str(error)) from error

    async def steps(self, settings: BackendSettings, capabilities: Capabilities) -> StepLearner:
        try:
            return await self._make_steps(settings, capabilities)
        except ProfileError as error:
            raise BackendUnusable(f"profile: {error}") from error

    async def _make_steps(self, settings: BackendSettings, capabilities: Capabilities) -> ProfiledSteps:
        """Raises ProfileError."""
        measured = settings.profile is not None
        if settings.profile is not None:
            profile = await asyncio.to_thread(load, settings.profile)
        else:
            known = {
                "kv_tokens": settings.limits.kv_tokens or capabilities.kv_tokens,
                "max_running_seqs": settings.limits.max_running_seqs or capabilities.max_running_seqs,
                "max_batched_tokens": settings.limits.max_batched_tokens or capabilities.max_batched_tokens,
                "max_model_tokens": settings.limits.max_model_tokens or capabilities.max_model_tokens,
                "block_tokens": settings.limits.block_tokens or capabilities.block_tokens,
            }
            profile = prior(Limits(**{name: value for name, value in known.items() if value is not None}))
        steps = ProfiledSteps(profile, measured=measured, chunk_tokens=capabilities.max_batched_tokens)
        saved = self._saved.corrections.get(settings.name)
        if saved is not None:
            steps.restore(saved)
        steps.hear(self._heard.steps.get(settings.name, ()))
        self._steps[settings.name] = steps
        return steps

    def to_json(self) -> bytes:
        """Everything that was learned."""
        corrections = dict(self._saved.corrections)
        corrections |= {name: steps.corrector.to_json() for name, steps in self._steps.items()}
        saved = Saved(
            source=self.source,
            corrections=corrections,
            lengths=self._lengths.book.to_json(),
            chars_per_token=self._counter.learned(),
        )
        return saved.model_dump_json().encode()

    async def evidence(self) -> Evidence:
        """What was observed here. Streams go on between the backends, each of which takes a moment."""
        steps: dict[str, StepEvidence] = {}
        for name, learner in list(self._steps.items()):
            steps[name] = learner.corrector.evidence()
            await asyncio.sleep(0)
        lengths = self._lengths.book.evidence()
        return Evidence(
            steps={name: evidence for name, evidence in steps.items() if evidence.steps},
            lengths=lengths if lengths.classes else None,
            chars_per_token=self._counter.learned(),
        )

    async def hear(self, others: Heard) -> None:
        """What all other sources observed, in place of what was heard before."""
        before, self._heard = self._heard, others
        for name, steps in list(self._steps.items()):
            if others.steps.get(name) != before.steps.get(name):
                steps.hear(others.steps.get(name, ()))
                await asyncio.sleep(0)
        self._lengths.hear(others.lengths)
        self._counter.hear(others.chars_per_token)

    async def save(self) -> None:
        """Write the file, whole or not at all; nothing without a path. Raises OSError."""
        if self._path is not None:
            # The text is made here, where nothing can change underneath; only the writing is slow.
            await asyncio.to_thread(_write_whole, self._path, self.to_json())


def _write_whole(path: Path, data: bytes) -> None:
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_bytes(data)
    beside.replace(path)
