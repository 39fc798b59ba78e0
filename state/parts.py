"""What one replica carries on one backend, kept exact through leases and measurements."""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduling.load import Cost, Floor, LoadVector


@dataclass(slots=True)
class Sums:
    """A load vector being added up."""

    decodes: int = 0
    peak_kv_tokens: int = 0
    queued_prefill_tokens: int = 0
    residents: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, vector: LoadVector) -> Sums:
        residents = {tier: count for tier, count in vector.residents.items() if count > 0}
        return cls(
            max(vector.decodes, 0),
            max(vector.peak_kv_tokens, 0),
            max(vector.queued_prefill_tokens, 0),
            residents,
        )

    def add(self, cost: Cost) -> None:
        self.decodes += cost.decodes
        self.peak_kv_tokens += cost.peak_kv_tokens
        self.queued_prefill_tokens += cost.prefill_tokens
        if cost.decodes:
            self.residents[cost.tier] = self.residents.get(cost.tier, 0) + cost.decodes

    def take(self, cost: Cost, prefill_tokens: int) -> None:
        """Never below zero: what was measured may be less than what was reserved."""
        self.decodes = max(self.decodes - cost.decodes, 0)
        self.peak_kv_tokens = max(self.peak_kv_tokens - cost.peak_kv_tokens, 0)
        self.queued_prefill_tokens = max(self.queued_prefill_tokens - prefill_tokens, 0)
        left = self.residents.get(cost.tier, 0) - cost.decodes
        if left > 0:
            self.residents[cost.tier] = left
        else:
            self.residents.pop(cost.tier, None)

    @property
    def idle(self) -> bool:
        return not (self.decodes or self.peak_kv_tokens or self.queued_prefill_tokens or self.residents)


@dataclass(slots=True)
class Part:
    """What one replica carries on one backend: what it measured last, and what it reserved since."""

    measured: Sums = field(default_factory=Sums)
    reserved: Sums = field(default_factory=Sums)
    slack: Floor = ()  # of those measured; reservations say nothing of it
    queued_slack: Floor = ()
    measured_leases: int = 0  # leases that the last publish saw and that have not ended
    leases: int = 0
    sequence: int = 0  # of the last write
    published: int = 0  # of the last publish
    written_s: float = 0.0
    age_s: float = 0.0  # how old what was written was then

    @property
    def idle(self) -> bool:
        return not self.leases and self.measured.idle and self.reserved.idle

    def vector(self, age_s: float) -> LoadVector:
        residents = dict(self.measured.residents)
        for tier, count in self.reserved.residents.items():
            residents[tier] = residents.get(tier, 0) + count
        return LoadVector(
            self.measured.decodes + self.reserved.decodes,
            self.measured.peak_kv_tokens + self.reserved.peak_kv_tokens,
            self.measured.queued_prefill_tokens + self.reserved.queued_prefill_tokens,
            residents,
            age_s,
            self.slack,
            self.queued_slack,
        )

    def wrote(self, now_s: float, age_s: float = 0.0) -> None:
        self.written_s, self.age_s = now_s, age_s

    def begin(self, cost: Cost) -> int:
        """Carry one lease more; the sequence of this write."""
        self.sequence += 1
        self.leases += 1
        self.reserved.add(cost)
        return self.sequence

    def publish(self, own: LoadVector, sequence: int) -> None:
        self.sequence = self.published = sequence
        self.measured, self.reserved = Sums.of(own), Sums()
        self.slack, self.queued_slack = own.slack, own.queued_slack
        self.measured_leases = self.leases

    def end(self, cost: Cost, granted_at: int) -> None:
        """Take away the lease that was granted by write `granted_at`.

        When a publish came since, only the next one can tell how much of its prompt is still queued. Until then
        its prefill stays counted, which may hold a request back but breaks no promise.
        """
        self.sequence += 1
        self.leases -= 1
        if granted_at > self.published:
            self.reserved.take(cost, cost.prefill_tokens)
            return
        self.measured_leases -= 1
        if self.measured_leases:
            self.measured.take(cost, 0)
        else:
            self.measured = Sums()
            self.slack = self.queued_slack = ()
