"""The fleet as operators see it: what the core carries, beside what the engines say."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.dispatch import Shell
from gateway.driving import Driving
from gateway.fleet import GatewayFleet, Member, Phase
from gateway.telemetry import BackendNumbers, Telemetry
from scheduling.dispatcher import Dispatcher
from scheduling.knobs import Setting
from state.contract import Mode

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


class FleetView:
    """Reads the dispatcher, the fleet and the counters; changes nothing."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        fleet: GatewayFleet,
        shell: Shell,
        telemetry: Telemetry,
        driving: Driving,
        version: str,
    ) -> None:
        self._driving = driving
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._shell = shell
        self._telemetry = telemetry
        self._version = version

    def numbers(self) -> list[BackendNumbers]:
        """Every configured backend."""
        return [self._numbers(member) for member in self._fleet.members()]

    @property
    def store_mode(self) -> Mode:
        """How this replica stands with the shared state."""
        return self._fleet.store_mode

    @property
    def replicas(self) -> int:
        """Live replicas, this one included, as far as is known."""
        return self._fleet.replicas

    def _numbers(self, member: Member) -> BackendNumbers:
        ledger = self._dispatcher.fleet.get(member.name)
        backend = member.published
        if ledger is None:
            return BackendNumbers(member.name, None, False, False, None, 0, 0, 0, 0)
        load = ledger.own_load()
        return BackendNumbers(
            name=member.name,
            tier=ledger.tier,
            up=member.phase is Phase.UP,
            calibrated=backend is not None and backend.calibrated,
            load=ledger.load,
            decodes=load.decodes,
            peak_kv_tokens=load.peak_kv_tokens,
            queued_prefill_tokens=load.queued_prefill_tokens,
            promoted=sum(resident.guest for resident in ledger.residents.values()),
            driven=member.driven,
        )

    def conserved(self) -> bool:
        """Whether arrived = finished + failed + refused + cancelled + held + running, here and in the core."""
        counts, shell = self._shell.counts, self._shell
        ended = counts.finished + counts.failed + counts.refused + counts.cancelled
        return counts.arrived == ended + shell.held + shell.running and self._dispatcher.counts.conserved

    def state(self, now_s: float) -> dict[str, Json]:
        """Everything at once, for `GET /admin/v1/state`."""
        counts, shell = self._shell.counts, self._shell
        held = self._dispatcher.held_by_tier()
        return {
            "version": self._version,
            "policy": self._dispatcher.policy.name,
            "requests": {
                "arrived": counts.arrived,
                "finished": counts.finished,
                "failed": counts.failed,
                "refused": counts.refused,
                "cancelled": counts.cancelled,
                "retried": counts.retried,
                "held": shell.held,
                "running": shell.running,
                "output_tokens": counts.tokens,
                "merged_streams": self._telemetry.merged_streams,
                "merged_tokens": self._telemetry.merged_tokens,
                "conserved": self.conserved(),
            },
            "held": dict(held),
            "decisions": dict(self._telemetry.outcomes),
            "refusals": dict(self._telemetry.refusals),
            "tiers": [self._tier(tier.name) for tier in self._dispatcher.tiers.tiers],
            "backends": [self._backend(member, numbers, now_s) for member, numbers in self._pairs()],
            "backend_seconds": self._dispatcher.fleet.backend_seconds(now_s),
            "prediction_error": {
                "ttft_p50": self._telemetry.ttft_error.quantile(0.5),
                "ttft_p90": self._telemetry.ttft_error.quantile(0.9),
                "tpot_p50": self._telemetry.tpot_error.quantile(0.5),
                "tpot_p90": self._telemetry.tpot_error.quantile(0.9),
            },
            "loop_lag_s": shell.loop_lag_s,
            "loop_lag_max_s": shell.loop_lag_max_s,
            "store_down": shell.store_down or self.store_mode is Mode.ALONE,
            "store_mode": self.store_mode.value,
            "replicas": self.replicas,
        }

    def _pairs(self) -> list[tuple[Member, BackendNumbers]]:
        return [(member, self._numbers(member)) for member in self._fleet.members()]

    def _tier(self, name: str) -> dict[str, Json]:
        tier = self._dispatcher.tiers[name]
        numbers = self._telemetry.tiers.get(name)
        ttft_s, tpot_s = tier.slo.ttft_s, tier.slo.tpot_s
        found: dict[str, Json] = {
            "name": name,
            "ttft_ms": None if ttft_s is None else ttft_s * 1e3,
            "tpot_ms": None if tpot_s is None else tpot_s * 1e3,
            "on_miss": tier.on_miss.value,
            "held": self._dispatcher.held_by_tier().get(name, 0),
        }
        if numbers is not None:
            counter = numbers.counter
            found |= {
                "offered": counter.offered,
                "promised": counter.promised,
                "attained": counter.attained,
                "attainment": counter.attainment,
                "finished": counter.finished,
                "refused": counter.refused,
                "failed": counter.failed,
                "ttft_p50_s": numbers.ttft_s.quantile(0.5),
                "ttft_p99_s": numbers.ttft_s.quantile(0.99),
                "tpot_p50_s": numbers.tpot_s.quantile(0.5),
                "tpot_p99_s": numbers.tpot_s.quantile(0.99),
            }
        return found

    def _backend(self, member: Member, numbers: BackendNumbers, now_s: float) -> dict[str, Json]:
        capabilities, learner = member.capabilities, member.learner
        ledger = self._dispatcher.fleet.get(member.name)
        tiers: dict[str, Json] = {}
        if ledger is not None:
            residents: Mapping[str, int] = ledger.own_load().residents
            tiers.update(residents)
        timing = None if learner is None else learner.timing()
        return {
            "name": member.name,
            "url": member.settings.url,
            "phase": member.phase.value,
            "problem": member.problem,
            "engine": None if capabilities is None else capabilities.engine,
            "emulated": capabilities is not None and capabilities.emulated,
            "models": [*sorted(member.models)],
            "tier": numbers.tier,
            "calibrated": numbers.calibrated,
            "profile_error": None if timing is None else timing.error,
            "load": numbers.load,
            "running": numbers.decodes,
            "residents": tiers,
            "promoted": numbers.promoted,
            "peak_kv_tokens": numbers.peak_kv_tokens,
            "queued_prefill_tokens": numbers.queued_prefill_tokens,
            "step_s": None if ledger is None else ledger.step_s,
            "engine_running": member.engine.running,
            "engine_waiting": member.engine.waiting,
            "engine_waiting_tokens": member.engine.waiting_tokens,
            "engine_kv_used": member.engine.kv_used_fraction,
            "engine_age_s": member.engine.age_s,
            "driven": member.driven,
            "control": [_shown(one, now_s) for one in reversed(self._driving.controller.decisions(member.name))],
        }


def _shown(setting: Setting, now_s: float) -> dict[str, Json]:
    """What the controller decided, without what is the engine's own."""
    numbers: dict[str, Json] = {
        "chunk_tokens": setting.chunk_tokens,
        "running_cap": setting.running_cap,
        "prefill_tokens_s": setting.prefill_tokens_s,
        "concurrency": setting.concurrency,
        "tier": setting.tier,
    }
    told: dict[str, Json] = {"rung": setting.rung.value, "reason": setting.reason, "age_s": now_s - setting.at_s}
    return told | {name: value for name, value in numbers.items() if value is not None}
