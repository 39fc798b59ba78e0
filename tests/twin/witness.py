"""A dispatcher that writes down what it was told and what it decided: the same for both shells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from scheduling import events as ev
from scheduling.dispatcher import Dispatcher


@dataclass(frozen=True, slots=True)
class Decided:
    """One decision. `request` counts arrivals from 0; None where a backend is moved for nobody in particular."""

    at_s: float
    request: int | None
    outcome: str
    backend: str | None

    @property
    def what(self) -> tuple[int | None, str, str | None]:
        """The decision without its time."""
        return self.request, self.outcome, self.backend


@dataclass(frozen=True, slots=True)
class Told:
    """One event and what the dispatcher wants done about it, in words. For finding where two runs part."""

    at_s: float
    event: str
    actions: tuple[str, ...]

    @property
    def what(self) -> tuple[str, tuple[str, ...]]:
        """All of it but the time."""
        return self.event, self.actions


@dataclass(slots=True)
class Log:
    """What one run decided, in order, and everything that led to it."""

    decided: list[Decided] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)

    def told_but(self, names: tuple[str, ...]) -> list[Told]:
        """Everything that was told, without some kinds of events."""
        return [one for one in self.told if not one.event.startswith(names)]


TOLERANCE_S = 1e-9
"""Both shells reckon in floating-point seconds, and add in another order."""


def first_difference(one: Sequence[Decided | Told], other: Sequence[Decided | Told]) -> str | None:
    """Where two runs part, with what was the same before; None when they do not."""
    for index, (left, right) in enumerate(zip_longest(one, other)):
        same = left is not None and right is not None and left.what == right.what
        if not same or abs(left.at_s - right.at_s) > TOLERANCE_S:
            before = "\n  ".join(map(str, one[max(0, index - 5) : index]))
            return f"number {index}, after\n  {before}\nis\n  {left}\nhere and\n  {right}\nthere"
    return None


class Witness(Dispatcher):
    """A dispatcher with a log. Requests are named by the order of their arrival."""

    def __init__(self, *made_of: object, **more: object) -> None:
        super().__init__(*made_of, **more)  # type: ignore[arg-type]  # handed on as it came
        self.log = Log()
        self._numbers: dict[str, int] = {}

    def handle(self, event: ev.Event, now_s: float) -> list[ev.Action]:
        if isinstance(event, ev.Arrived):
            self._numbers[event.request.request_id] = len(self._numbers)
        actions = super().handle(event, now_s)
        self.log.decided.extend(
            decided for action in actions if (decided := self._decided(action, now_s)) is not None
        )
        self.log.told.append(Told(now_s, self._event(event), tuple(map(self._action, actions))))
        return actions

    def _decided(self, action: ev.Action, now_s: float) -> Decided | None:
        match action:
            case ev.Reserve(request_id=asked) | ev.Hold(request_id=asked):
                decision = action.decision
                return Decided(now_s, self._numbers[asked], decision.outcome.value, decision.backend)
            case ev.Refuse(request_id=asked, refusal=refusal):
                return Decided(now_s, self._numbers[asked], f"refused: {refusal.kind.value}", None)
            case ev.Claim(backend=backend, tier=tier):
                return Decided(now_s, None, f"claim for {tier}", backend)
            case ev.HandBack(backend=backend):
                return Decided(now_s, None, "hand back", backend)
            case ev.Open() | ev.Release():
                return None

    def _lease(self, lease_id: str) -> str:
        request_id, _, attempt = lease_id.partition("#")
        return f"{self._numbers[request_id]}#{attempt}"

    def _event(self, event: ev.Event) -> str:
        name = type(event).__name__
        match event:
            case ev.Arrived(request):
                return f"{name} {self._numbers[request.request_id]} {request.tier} {request.prompt_tokens}"
            case ev.Progressed():
                told = ", ".join(
                    sorted(f"{self._lease(lease_id)}={tokens}" for lease_id, tokens in event.progress)
                )
                step_s, age_s = event.step_s, event.last_step_age_s
                step = "-" if step_s is None else f"{step_s:.6f}"
                age = "-" if age_s is None else f"{age_s:.6f}"
                return f"{name} {event.backend} step {step} age {age} {told}"
            case ev.FirstToken() | ev.Ended() | ev.OpenFailed() | ev.Reserved() | ev.ReserveRefused():
                kind = event.kind.value if isinstance(event, ev.Ended) else ""
                count = event.output_tokens if isinstance(event, ev.Ended) else ""
                return f"{name} {self._lease(event.lease_id)} {kind} {count}"
            case ev.BackendChanged(backend):
                return f"{name} {backend.name} {backend.state.value}"
            case ev.MembershipChanged() | ev.Claimed() | ev.ClaimRefused():
                return f"{name} {event.backend} {event.tier}"
            case ev.HandedBack() | ev.HandBackRefused() | ev.LoadPublished():
                return f"{name} {event.backend}"
            case _:
                return name

    def _action(self, action: ev.Action) -> str:
        match action:
            case ev.Open():
                return f"open {self._lease(action.lease_id)} on {action.backend}"
            case ev.Release():
                return f"release {self._lease(action.lease_id)} on {action.backend}"
            case _:
                decided = self._decided(action, 0.0)
                return "" if decided is None else f"{decided.what}"
