"""What may be replaced while the gateway runs: settings, tiers and keys, always together."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace

from gateway.asked import Caller
from gateway.config import Settings, make_tiers, tier_set
from gateway.config import TierSettings as TierSettings
from gateway.errors import Unauthorized
from scheduling.tiers import TierSet


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One consistent configuration."""

    settings: Settings
    tiers: TierSet
    version: int


class Live:
    """Holds the configuration of the moment; readers take `now` once per request."""

    def __init__(self, settings: Settings) -> None:
        self.now = Snapshot(settings, tier_set(settings), 1)

    def replace(self, settings: Settings) -> Snapshot:
        """A configuration read anew."""
        self.now = Snapshot(settings, tier_set(settings), self.now.version + 1)
        return self.now

    def replace_tiers(self, tiers: tuple[TierSettings, ...], default: str) -> Snapshot:
        """Other tiers, until the configuration is read anew. Raises ValueError."""
        made = make_tiers(tiers, default)
        settings = self.now.settings.model_copy(update={"tiers": tiers, "default_tier": default})
        self.now = replace(self.now, settings=settings, tiers=made, version=self.now.version + 1)
        return self.now

    def caller(self, token: str | None) -> Caller:
        """Whose key this is. Raises Unauthorized; without configured keys everybody is let in."""
        keys = self.now.settings.keys
        if not keys:
            return Caller()
        found: Caller | None = None
        if token is not None:
            given = _secret_bytes(token)
            for key in keys:  # every key is compared, so the time tells nothing
                if hmac.compare_digest(_secret_bytes(key.key.get_secret_value()), given):
                    found = Caller(key.tenant, key.tier, key.tightest_tier)
        if found is None:
            raise Unauthorized("A valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def is_admin(self, token: str | None) -> bool:
        """Whether this is the admin token; always False when none is configured."""
        expected = self.now.settings.admin_token
        if expected is None or token is None:
            return False
        return hmac.compare_digest(_secret_bytes(expected.get_secret_value()), _secret_bytes(token))


def _secret_bytes(secret: str) -> bytes:
    """Bytes to compare. A header's bytes that are no UTF-8 come as surrogates, which must not be an error."""
    return secret.encode("utf-8", "surrogatepass")
