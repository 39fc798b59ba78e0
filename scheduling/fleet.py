"""The fleet as the dispatcher sees it: ledgers by tier, each tier ordered by load (the gradient), and the pool.

The order is kept by insertion when one ledger changes; a decision only walks it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping

from scheduling.backends import Backend, BackendState, EngineLimits
from scheduling.ledger import Ledger
from scheduling.tiers import Tier, TierSet

_Key = tuple[float, float, str]
NEIGHBOUR_RESERVE = 0.25
"""Part of the time between an idle backend's step and a tighter neighbour's pace that is kept for the latter."""
_CLOSED = ""  # where backends are listed that take nothing; no tier has this name


class Fleet:
    """All backends. `tiers` may be replaced; a backend of a tier that is gone counts as pool."""

    def __init__(self, tiers: TierSet, demand_window_s: float) -> None:
        self.tiers = tiers
        self._demand_window_s = demand_window_s
        self._ledgers: dict[str, Ledger] = {}
        self._keys: dict[str, tuple[str | None, _Key]] = {}
        self._order: dict[str | None, list[_Key]] = {}
        self._by_speed: list[tuple[float, str]] = []
        self._shortest: EngineLimits | None = None  # the shortest requests that any refuses; None: to be found
        self._last_demand_s: dict[str, float] = {}
        self._assigned_since_s: dict[str, float] = {}
        self._assigned_s = 0.0

    # --- membership ----------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Ledger:
        return self._ledgers[name]

    def get(self, name: str) -> Ledger | None:
        return self._ledgers.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._ledgers

    def __iter__(self) -> Iterator[Ledger]:
        return iter(self._ledgers.values())

    def __len__(self) -> int:
        return len(self._ledgers)

    def put(self, backend: Backend, now_s: float) -> Ledger:
        """Add a backend (to the pool), or replace what is known of one."""
        self._shortest = None
        ledger = self._ledgers.get(backend.name)
        if ledger is None:
            ledger = self._ledgers[backend.name] = Ledger(backend)
        else:
            self._by_speed.remove((ledger.alone_s, backend.name))
            ledger.renew(backend, now_s)
        insort(self._by_speed, (ledger.alone_s, backend.name))
        self.reorder(ledger)
        return ledger

    def remove(self, name: str, now_s: float) -> Ledger | None:
        ledger = self._ledgers.pop(name, None)
        self._shortest = None
        if ledger is not None:
            self._unlist(name)
            self._by_speed.remove((ledger.alone_s, name))
            self._note_assignment(name, None, now_s)
        return ledger

    def set_membership(self, name: str, tier: str | None, epoch: int, now_s: float) -> None:
        ledger = self._ledgers.get(name)
        if ledger is None or epoch < ledger.epoch:
            return
        ledger.epoch = epoch
        ledger.tier = tier
        ledger.empty_checks = 0
        self._note_assignment(name, tier, now_s)
        self.reorder(ledger)

    def set_tiers(self, tiers: TierSet) -> None:
        self.tiers = tiers
        for ledger in self._ledgers.values():
            self.reorder(ledger)

    def tightest_of(self, residents: Mapping[str, int]) -> float:
        """The tightest pace of residents counted by tier; infinity without any, or where their tier is gone."""
        tiers = [tier.host_tpot_s for tier in self.tiers.tiers if residents.get(tier.name)]
        return min(tiers, default=math.inf)

    # --- the gradient --------------------------------------------------------------------------------------

    def reorder(self, ledger: Ledger) -> None:
        """Put a ledger that changed where its load belongs; one that takes nothing belongs to no tier's order,
        so that a tier whose backends are all down counts as having none."""
        name = ledger.backend.name
        self._unlist(name)
        tier = ledger.tier if ledger.tier in self.tiers else None
        if not is_open(ledger):
            tier = _CLOSED
        ledger.load = self._load(ledger, tier)
        key = (-ledger.load, -ledger.kv_fraction(), name)
        insort(self._order.setdefault(tier, []), key)
        self._keys[name] = (tier, key)

    def _unlist(self, name: str) -> None:
        listed = self._keys.pop(name, None)
        if listed is not None:
            tier, key = listed
            order = self._order[tier]
            del order[bisect_left(order, key)]

    def _load(self, ledger: Ledger, tier: str | None) -> float:
        """Predicted steady step time over the host's pace; KV fraction where there is no pace."""
        if not ledger.seqs:
            return 0.0
        host_s = self.tiers[tier].host_tpot_s if tier else math.inf
        if math.isinf(host_s):
            return ledger.kv_fraction()
        return ledger.backend.step_time.decode_seconds(ledger.seqs, ledger.peak_kv_tokens) / host_s

    def in_tier(self, tier: str) -> list[Ledger]:
        """Those of a tier that are up, highest load first; ties by KV fraction, then name."""
        ledgers = self._ledgers
        return [ledgers[key[2]] for key in self._order.get(tier, ())]

    def walk_tier(self, tier: str, emptiest_first: bool = False) -> Iterator[Ledger]:
        """The same without building the list: for a walk that stops early. Do not change the fleet in it."""
        ledgers = self._ledgers
        order = self._order.get(tier, ())
        for key in reversed(order) if emptiest_first else order:
            yield ledgers[key[2]]

    def tier_size(self, tier: str) -> int:
        return len(self._order.get(tier, ()))

    def pool(self) -> list[Ledger]:
        """Backends of no tier that are up and that nobody is claiming here, by name."""
        ledgers = self._ledgers
        return [ledgers[key[2]] for key in self._order.get(None, ()) if ledgers[key[2]].claiming_for is None]

    def empty_beside(self, tier: str) -> Iterator[Ledger]:
        """Backends of other tiers that carry nothing and may be relabelled: the tails of the gradients."""
        for name, order in self._order.items():
            if name is None or name == tier:
                continue
            for load, _, backend in reversed(order):
                if load:
                    break
                ledger = self._ledgers[backend]
                if ledger.idle and ledger.claiming_for is None and not ledger.backend.pinned:
                    yield ledger

    def serving(self, model: str) -> Iterable[Ledger]:
        return (ledger for ledger in self._ledgers.values() if ledger.backend.serves(model))

    def all_take(self, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether no backend is too short for such a request."""
        if self._shortest is None:
            limits = [ledger.backend.limits for ledger in self._ledgers.values()]
            models = [one.max_model_tokens for one in limits if one.max_model_tokens is not None]
            prompts = [one.max_prompt_tokens for one in limits if one.max_prompt_tokens is not None]
            self._shortest = EngineLimits(
                max_model_tokens=min(models, default=None), max_prompt_tokens=min(prompts, default=None)
            )
        return self._shortest.takes(prompt_tokens, output_tokens)

    def fastest(self, model: str) -> Iterator[Ledger]:
        """Those that serve a model and are up, the shortest step of an idle backend first."""
        for _, name in self._by_speed:
            ledger = self._ledgers[name]
            if is_open(ledger) and ledger.backend.serves(model):
                yield ledger

    # --- demand and sharing --------------------------------------------------------------------------------

    def note_demand(self, tier: str, now_s: float) -> None:
        self._last_demand_s[tier] = now_s

    def active(self, tier: str, now_s: float) -> bool:
        """Whether the tier had a request lately."""
        return now_s - self._last_demand_s.get(tier, -math.inf) <= self._demand_window_s

    def active_tiers(self, now_s: float) -> list[Tier]:
        return [tier for tier in self.tiers.tiers if self.active(tier.name, now_s)]

    def host_tpot_s(self, ledger: Ledger, now_s: float) -> float:
        """The pace a backend keeps for newcomers: its tier's, or that of a tighter neighbour that lives with it.

        A tier in demand that holds no backend lives with the nearest looser tier that has exactly one. From then
        on the backend keeps the tighter pace, and `NEIGHBOUR_RESERVE` of the room within it is not for the looser
        ones, so that they, however many, cannot starve it.
        """
        if ledger.tier is None or ledger.tier not in self.tiers:
            return math.inf
        tier = self.tiers[ledger.tier]
        pace_s = tier.host_tpot_s
        if self.tier_size(tier.name) > 1:
            return pace_s
        for tighter in reversed(self.tiers.tiers[: tier.rank]):
            if self.tier_size(tighter.name):
                break
            if self.active(tighter.name, now_s):
                room_s = tighter.host_tpot_s - ledger.alone_s * ledger.backend.margin
                pace_s = tighter.host_tpot_s - NEIGHBOUR_RESERVE * max(room_s, 0.0)
        return pace_s

    def neighbours(self, tier: Tier) -> Iterator[Ledger]:
        """Backends of the nearest looser tier that has any: where a tier without a backend lives."""
        for looser in self.tiers.tiers[tier.rank + 1 :]:
            if self.tier_size(looser.name):
                yield from self.walk_tier(looser.name)
                return

    def to_relabel(self, tier: Tier, model: str) -> Ledger | None:
        """The backend a tier without one takes: the emptiest of the largest holder, if that keeps another."""
        largest: list[Ledger] = []
        for other in self.tiers.tiers:
            if other.name == tier.name or self.tier_size(other.name) <= max(len(largest), 1):
                continue
            largest = self.in_tier(other.name)
        for ledger in reversed(largest):
            fits = is_open(ledger) and not ledger.backend.pinned and ledger.backend.serves(model)
            if fits and can_keep(ledger, tier):
                return None if ledger.claiming_for else ledger
        return None

    # --- cost ----------------------------------------------------------------------------------------------

    def _note_assignment(self, name: str, tier: str | None, now_s: float) -> None:
        since_s = self._assigned_since_s.pop(name, None)
        if since_s is not None:
            self._assigned_s += now_s - since_s
        if tier is not None:
            self._assigned_since_s[name] = now_s

    def backend_seconds(self, now_s: float) -> float:
        """Backend-seconds spent in a tier so far: the cost a pool saves (PolyServe §5.4)."""
        return self._assigned_s + sum(now_s - since_s for since_s in self._assigned_since_s.values())


def is_open(ledger: Ledger) -> bool:
    """Whether a backend takes newcomers at all."""
    return ledger.backend.state is BackendState.UP


def can_keep(ledger: Ledger, tier: Tier) -> bool:
    """Whether a backend makes tokens at a tier's pace at all, if only for a single sequence."""
    backend = ledger.backend
    return not backend.calibrated or ledger.alone_s * backend.margin <= tier.host_tpot_s
