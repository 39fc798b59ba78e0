"""What this replica carries, lease by lease: `tiergate state audit` compares it with the store and the engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.dispatch import Shell
from gateway.fleet import GatewayFleet
from gateway.view import Json
from scheduling.dispatcher import Dispatcher
from state.contract import Store


@dataclass(frozen=True, slots=True)
class Place:
    """Which replica of which fleet this is, and the lease time; without a shared store there is no fleet."""

    replica: str = "only"
    fleet: str | None = None
    lease_s: float | None = None


@dataclass(frozen=True, slots=True)
class CarriedView:
    """Reads the shell's tickets and the dispatcher's ledgers; changes nothing."""

    dispatcher: Dispatcher
    fleet: GatewayFleet
    shell: Shell
    store: Store
    place: Place = field(default_factory=Place)

    def state(self) -> dict[str, Json]:
        """One replica's part of `GET /admin/v1/carried`."""
        return {
            "replica": self.place.replica,
            "fleet": self.place.fleet,
            "lease_s": self.place.lease_s,
            "mode": self.store.mode.value,
            "replicas": self.store.replicas,
            "backends": self._backends(),
            "leases": self._leases(),
            "passing": [*self.shell.passing_leases()],
        }

    def _backends(self) -> list[Json]:
        found: list[Json] = []
        for member in self.fleet.members():
            ledger = self.dispatcher.fleet.get(member.name)
            one: dict[str, Json] = {
                "name": member.name,
                "url": member.settings.url,
                "engine": None if member.capabilities is None else member.capabilities.engine,
                "phase": member.phase.value,
            }
            if ledger is not None:
                load = ledger.own_load()
                one |= {
                    "tier": ledger.tier,
                    "epoch": ledger.epoch,
                    "decodes": load.decodes,
                    "peak_kv_tokens": load.peak_kv_tokens,
                    "queued_prefill_tokens": load.queued_prefill_tokens,
                    "residents": dict(load.residents),
                }
            found.append(one)
        return found

    def _leases(self) -> list[Json]:
        return [
            {
                "lease": ticket.lease_id,
                "request": ticket.request.request_id,
                "backend": ticket.backend,
                "stage": ticket.stage.value,
                "sequences": ticket.request.sequences,
            }
            for ticket in self.shell.tickets()
            if ticket.lease_id is not None
        ]
