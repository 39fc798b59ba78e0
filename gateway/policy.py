"""The part of the configuration that a fleet's replicas share, and its form in the store.

Tiers, backends, client keys, the placing policy and whether engines are driven are one document
(`state.documents`). Client keys stand in it
as SHA-256 digests, so the store never holds what lets a client in. Backends' own keys stand in it as they are,
because every replica must send them: who can read the store can read those.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.config import BackendSettings, KeySettings, PolicySettings, Settings, TierSettings
from gateway.words import cut
from state.documents import Document

SCHEMA = 1
"""Of the document's body. It rises when an older Tiergate could not serve by the document any more."""


class PolicyRefused(Exception):
    """A document cannot be used by this replica; the message says why."""


class FleetPolicy(BaseModel):
    """What is the same on all replicas of a fleet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tiers: tuple[TierSettings, ...]
    default_tier: str
    backends: tuple[BackendSettings, ...]
    keys: tuple[KeySettings, ...]
    policy: PolicySettings
    driving: bool = True


SECTIONS = tuple(FleetPolicy.model_fields)


def policy_of(settings: Settings) -> FleetPolicy:
    """The shared part of a configuration, with the clients' keys as digests."""
    keys = tuple(
        key if key.key is None else key.model_copy(update={"key": None, "sha256": key.digest})
        for key in settings.keys
    )
    return FleetPolicy(
        tiers=settings.tiers,
        default_tier=settings.default_tier,
        backends=settings.backends,
        keys=keys,
        policy=settings.policy,
        driving=settings.driving,
    )


def with_policy(settings: Settings, policy: FleetPolicy) -> Settings:
    """A replica's own configuration with the fleet's policy in it. Raises PolicyRefused when they do not fit."""
    own = {name: getattr(settings, name) for name in Settings.model_fields}
    shared = {name: getattr(policy, name) for name in SECTIONS}
    try:
        return Settings.model_validate(own | shared)
    except ValidationError as error:
        raise PolicyRefused(_first(error)) from None


def to_body(policy: FleetPolicy) -> str:
    """The document's text. The same policy gives the same text."""
    fields = policy.model_dump(mode="json", exclude_defaults=True)
    for written, backend in zip(fields["backends"], policy.backends, strict=True):
        if backend.api_key is not None:
            written["api_key"] = backend.api_key.get_secret_value()  # pydantic writes asterisks
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def read_body(document: Document) -> FleetPolicy:
    """The policy in a document. Raises PolicyRefused for one of a newer Tiergate, or that is none."""
    draft = document.draft
    if draft.schema != SCHEMA:
        raise PolicyRefused(f"it has schema {draft.schema} and this version reads {SCHEMA}: upgrade this replica")
    try:
        return FleetPolicy.model_validate_json(draft.body)
    except ValidationError as error:
        raise PolicyRefused(_first(error)) from None


def differences(one: FleetPolicy, other: FleetPolicy) -> list[str]:
    """The sections in which two policies differ."""
    return [name for name in SECTIONS if getattr(one, name) != getattr(other, name)]


def _first(error: ValidationError) -> str:
    # Without the value itself: it may be a secret.
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in detail["loc"]) or "policy"
    return f"{cut(place)}: {detail['msg'].removeprefix('Value error, ')}"
