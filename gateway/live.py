"""What may be replaced while the gateway runs: settings, tiers and keys, always together."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.asked import Caller
from gateway.config import Settings, key_digest, tier_set
from gateway.errors import Unauthorized
from scheduling.tiers import TierSet


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent configuration.

    Attributes:
        version: of the fleet's policy in it (`state.documents`); 0 is what the replica was started with.
        callers: whose key it is, by the key's SHA-256.
    """

    settings: Settings
    tiers: TierSet
    version: int
    callers: Mapping[str, Caller]


class Live:
    """Holds the configuration of the moment; readers take `now` once per request."""

    def __init__(self, settings: Settings, version: int = 0) -> None:
        self.now = _snapshot(settings, version)

    def replace(self, settings: Settings, version: int) -> Snapshot:
        """Another configuration. Raises ValueError and keeps the one it has."""
        self.now = _snapshot(settings, version)
        return self.now

    def caller(self, token: str | None) -> Caller:
        """Whose key this is. Raises Unauthorized; without configured keys everybody is let in."""
        callers = self.now.callers
        if not callers:
            return Caller()
        # Looked up by digest: how long that takes says nothing about any key.
        found = None if token is None else callers.get(key_digest(token))
        if found is None:
            raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def is_admin(self, token: str | None) -> bool:
        """Whether this is the admin token; always False when none is configured."""
        expected = self.now.settings.admin_token
        if expected is None or token is None:
            return False
        return hmac.compare_digest(_secret_bytes(expected.get_secret_value()), _secret_bytes(token))


def _snapshot(settings: Settings, version: int) -> Snapshot:
    callers = {key.digest: Caller(key.tenant, key.tier, key.tightest_tier) for key in settings.keys}
    return Snapshot(settings, tier_set(settings), version, callers)


def _secret_bytes(secret: str) -> bytes:
    """Bytes to compare. A header's bytes that are no UTF-8 come as surrogates, which must not be an error."""
    return secret.encode("utf-8", "surrogatepass")
