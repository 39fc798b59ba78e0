"""The gateway's configuration: one YAML file, `TIERGATE_*` from the environment, and flags on top.

Every value is checked when it is read; an unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from adapters.http import endpoint
from gateway.words import cut, unknown
from scheduling.backends import EngineLimits
from scheduling.tiers import OnMiss, Slo, Tier, TierSet

ENV_PREFIX = "TIERGATE_"

PositiveMs = Annotated[float, Field(gt=0, le=3_600_000, allow_inf_nan=False)]
ReserveMs = Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)]
PositiveS = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/-]*$")]


class ConfigError(Exception):
    """The configuration cannot be used; the message names the place and the remedy."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineKind(Enum):
    AUTO = "auto"
    VLLM = "vllm"
    SGLANG = "sglang"
    TGI = "tgi"
    OPENAI = "openai"


class LimitSettings(_Model):
    """What the operator knows about the engine's limits; a probed value gives way to it."""

    max_running_seqs: PositiveInt | None = None
    max_batched_tokens: PositiveInt | None = None
    kv_tokens: PositiveInt | None = None
    max_model_tokens: PositiveInt | None = None
    max_prompt_tokens: PositiveInt | None = None
    block_tokens: PositiveInt | None = None


class BackendSettings(_Model):
    """One engine endpoint. `models` empty means: ask the engine. `pinned` keeps it in `tier` for good. `driving`
    unset means: as the fleet. `chunks_outside_tokens`: longer prompts are sent ahead to its prefix cache in chunks
    of so many tokens, unless it is driven; unset, they go whole."""

    url: str
    name: Name
    engine: EngineKind = EngineKind.AUTO
    models: tuple[str, ...] = ()
    profile: str | None = None
    tier: str | None = None
    pinned: bool = False
    driving: bool | None = None
    chunks_outside_tokens: PositiveInt | None = None
    api_key: SecretStr | None = None
    limits: LimitSettings = LimitSettings()

    @model_validator(mode="before")
    @classmethod
    def _name_from_url(cls, value: object) -> object:
        if isinstance(value, str):
            value = parse_backend_flag(value)
        if isinstance(value, Mapping) and "name" not in value and isinstance(value.get("url"), str):
            return {**value, "name": value["url"].split("://", 1)[-1].strip("/")}
        return value

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            endpoint(url)
        except ValueError as error:
            raise ValueError(f"{error}, not {cut(url)!r}") from None
        return url.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _pinned_needs_tier(self) -> Self:
        if self.pinned and self.tier is None:
            raise ValueError("a pinned backend needs `tier`")
        return self


class TierSettings(_Model):
    """A class of service; leave both times out for best effort."""

    name: Name
    ttft_ms: PositiveMs | None = None
    tpot_ms: PositiveMs | None = None
    on_miss: OnMiss = OnMiss.REFUSE


class PolicySettings(_Model):
    name: str = "polyserve"
    options: Mapping[str, float | int | bool | str] = Field(default_factory=dict)


class KeySettings(_Model):
    """One client key: whose it is, the tier it gets when it asks for none, and the tightest it may ask for.

    It is given as it is (`key`) or by the SHA-256 of its bytes in hexadecimal (`sha256`).
    """

    key: SecretStr | None = None
    sha256: Sha256 | None = None
    tenant: str
    tier: str | None = None
    tightest_tier: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"the key of {self.tenant} needs either `key` or `sha256`")
        return self

    @property
    def digest(self) -> str:
        """The SHA-256 of the key, however it was given."""
        if self.key is None:
            assert self.sha256 is not None
            return self.sha256
        return key_digest(self.key.get_secret_value())


class BodyLimits(_Model):
    body_bytes: PositiveInt = 16 << 20
    answer_bytes: PositiveInt = 64 << 20
    header_line_bytes: PositiveInt = 16 << 10
    header_fields: PositiveInt = 128
    event_bytes: PositiveInt = 4 << 20


class Timeouts(_Model):
    """`head_s`: an answer's first byte; `stall_s`: silence inside a stream; `client_stall_s`: a client that
    does not read."""

    head_s: PositiveS = 600
    stall_s: PositiveS = 120
    client_stall_s: PositiveS = 300
    body_s: PositiveS = 60
    keep_alive_s: PositiveS = 75


class HoldSettings(_Model):
    """`keep_alive_s`: after this long in the queue a stream is begun with SSE comments, so a later refusal can
    only be told as an error event. None never does."""

    keep_alive_s: PositiveS | None = None


class HealthSettings(_Model):
    every_s: PositiveS = 2.0
    failures: PositiveInt = 2


class TokenSettings(_Model):
    """`tokenizers`: model name to a tokenizer.json. `engine`: ask the engine's /tokenize for other models."""

    tokenizers: Mapping[str, Path] = Field(default_factory=dict)
    engine: bool = False
    chars_per_token: Annotated[float, Field(gt=0.1, lt=100)] = 4.0
    usage_every: PositiveInt = 1


class StoreKind(Enum):
    """Where the shared state is."""

    MEMORY = "memory"
    EMBEDDED = "embedded"
    REDIS = "redis"


class StoreSettings(_Model):
    """Where the state that replicas share is kept.

    Attributes:
        url: `memory` (one process), `embedded` (a Valkey that is started with the workers), or the address of a
            Redis or Valkey: `redis://`, `rediss://` (TLS), `unix://` and what else `state.redis.connect` reads.
        fleet: gateways with the same name on the same Redis share their backends; others do not see each other.
        lease_s: a replica that is not heard of for so long is taken for dead.
        timeout_ms: a store that does not answer within this is done without for the time being.
    """

    url: SecretStr = SecretStr("memory")
    fleet: Name = "default"
    lease_s: Annotated[float, Field(ge=1, le=600, allow_inf_nan=False)] = 10
    timeout_ms: PositiveMs = 100

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: SecretStr) -> SecretStr:
        text = url.get_secret_value()
        if text not in {StoreKind.MEMORY.value, StoreKind.EMBEDDED.value} and "://" not in text:
            # The text may be a URL with a password in it, so it is not repeated.
            raise ValueError("must be memory, embedded, or a URL such as redis://127.0.0.1:6379/0")
        return url

    @property
    def kind(self) -> StoreKind:
        text = self.url.get_secret_value()
        return StoreKind.REDIS if "://" in text else StoreKind(text)


class Settings(_Model):
    """Everything `tiergate serve` can be told."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    backends: tuple[BackendSettings, ...] = ()
    tiers: tuple[TierSettings, ...] = (
        TierSettings(name="fast", ttft_ms=1_000, tpot_ms=20),
        TierSettings(name="chat", ttft_ms=2_000, tpot_ms=50),
        TierSettings(name="summary", ttft_ms=5_000, tpot_ms=100),
        TierSettings(name="batch", on_miss=OnMiss.RELEGATE),
    )
    default_tier: str = "chat"
    policy: PolicySettings = PolicySettings()
    driving: bool = True
    orders_lapse_s: Annotated[float, Field(ge=3, le=3600)] = 30
    delivery_ms: ReserveMs = 5
    store: StoreSettings = StoreSettings()
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    keys: tuple[KeySettings, ...] = ()
    admin_token: SecretStr | None = None
    limits: BodyLimits = BodyLimits()
    timeouts: Timeouts = Timeouts()
    hold: HoldSettings = HoldSettings()
    health: HealthSettings = HealthSettings()
    tokens: TokenSettings = TokenSettings()
    drain_grace_s: PositiveS = 30
    tick_ms: PositiveMs = 50
    learned_state: Path | None = None
    log_requests: bool = True
    request_log: Path | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.workers > 1 and self.store.kind is StoreKind.MEMORY:
            raise ValueError(
                f"workers: {self.workers} processes need a store that they share: --store redis://HOST:PORT, or "
                "--store embedded for one that is started with them"
            )
        tiers = tier_set(self)
        names = [backend.name for backend in self.backends]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"backends: the names {double} are used twice")
        for backend in self.backends:
            if backend.tier is not None and backend.tier not in tiers:
                raise ValueError(f"backend {backend.name}: {unknown('tier', backend.tier, _names(tiers))}")
        for key in self.keys:
            for tier in (key.tier, key.tightest_tier):
                if tier is not None and tier not in tiers:
                    raise ValueError(f"key of {key.tenant}: {unknown('tier', tier, _names(tiers))}")
        return self


def key_digest(key: str) -> str:
    """SHA-256 of a client key's bytes, in hexadecimal. A header's bytes that are no UTF-8 come as surrogates."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _names(tiers: TierSet) -> list[str]:
    return [tier.name for tier in tiers.tiers]


def tier_set(settings: Settings) -> TierSet:
    """The tiers as the core knows them. Raises ValueError."""
    return make_tiers(settings.tiers, settings.default_tier)


def make_tiers(tiers: Sequence[TierSettings], default: str) -> TierSet:
    """Tiers in the order they were given, tight to loose. Raises ValueError."""
    made = tuple(
        Tier(
            tier.name,
            Slo(
                None if tier.ttft_ms is None else tier.ttft_ms / 1e3,
                None if tier.tpot_ms is None else tier.tpot_ms / 1e3,
            ),
            rank,
            tier.on_miss,
        )
        for rank, tier in enumerate(tiers)
    )
    return TierSet(made, default)


def engine_limits(configured: LimitSettings, probed: EngineLimits) -> EngineLimits:
    """What was configured, else what was probed."""
    return EngineLimits(
        max_running_seqs=configured.max_running_seqs or probed.max_running_seqs,
        max_batched_tokens=configured.max_batched_tokens or probed.max_batched_tokens,
        kv_tokens=configured.kv_tokens or probed.kv_tokens,
        max_model_tokens=configured.max_model_tokens or probed.max_model_tokens,
        block_tokens=configured.block_tokens or probed.block_tokens,
        max_prompt_tokens=configured.max_prompt_tokens or probed.max_prompt_tokens,
        lease_tokens=probed.lease_tokens,
    )


def parse_backend_flag(flag: str) -> dict[str, object]:
    """`URL[,profile=NAME][,model=NAME]...[,tier=NAME]` as given to `--backend`. Raises ConfigError."""
    url, *rest = flag.split(",")
    found: dict[str, object] = {"url": url}
    models: list[str] = []
    known = [name for name in BackendSettings.model_fields if name not in {"limits", "models"}] + ["model"]
    known += list(LimitSettings.model_fields)
    limits: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"--backend {flag}: {part!r} must be key=value")
        if key == "model":
            models.append(value)
        elif key in LimitSettings.model_fields:
            limits[key] = value
        elif key in known:
            found[key] = value
        else:
            raise ConfigError(f"--backend {flag}: {unknown('key', key, known)}")
    if models:
        found["models"] = models
    if limits:
        found["limits"] = limits
    return found


def load(
    path: Path | None, environment: Mapping[str, str], overrides: Mapping[str, object] | None = None
) -> Settings:
    """The settings of a file, the environment over it, and flags over both (`store.url` goes one level down).
    Raises ConfigError."""
    merged: dict[str, object] = {}
    if path is not None:
        merged = _read_yaml(path)
    _merge_environment(merged, environment)
    for key, value in (overrides or {}).items():
        if value is not None:
            _put(merged, key.split("."), value)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text in UTF-8: {error.reason} at byte {error.start}") from None
    loaded = _parse_yaml(text, str(path))
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: the file must hold keys and values, not a {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _parse_yaml(text: str, place: str) -> object:
    """A YAML document. Raises ConfigError."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise ConfigError(f"{place}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{place}: nested too deeply") from None


def _merge_environment(merged: dict[str, object], environment: Mapping[str, str]) -> None:
    """`TIERGATE_PORT=9000` and `TIERGATE_POLICY__NAME=random`; values are read as YAML."""
    for variable, text in sorted(environment.items()):
        if not variable.startswith(ENV_PREFIX):
            continue
        _put(merged, variable.removeprefix(ENV_PREFIX).lower().split("__"), _parse_yaml(text, variable))


def _put(merged: dict[str, object], place: Sequence[str], value: object) -> None:
    """Set one value, as deep as `place` says, and nothing beside it."""
    *groups, last = place
    target = merged
    for group in groups:
        inner = target.get(group)
        copied = dict(inner) if isinstance(inner, Mapping) else {}
        target[group] = copied
        target = copied
    target[last] = value


def _explain(detail: ErrorDetails) -> str:
    place = ".".join(str(part) for part in detail["loc"]) or "configuration"
    if detail["type"] == "extra_forbidden":
        *parents, name = detail["loc"]
        where = ".".join(str(part) for part in parents) or "configuration"
        return f"{where}: {unknown('key', str(name), _fields_at(parents))}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    model: type[BaseModel] | None = Settings
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = None if field is None else _model_in(field.annotation)
    return [] if model is None else list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:  # annotations have no better type
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in {tuple, Union, types.UnionType, Annotated, Literal}:
        for inner in get_args(annotation):
            found = _model_in(inner)
            if found is not None:
                return found
    return None
