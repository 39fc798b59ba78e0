"""An engine model that takes orders while it runs, as an engine with the plug-in does: they hold until they lapse.

What stands in the orders is obeyed from the next step on. An engine whose orders have lapsed, or whom nobody has
spoken to, runs as stock.
"""

from __future__ import annotations

from tiergate_engine.control import Mode, Orders
from tiergate_engine.drive import Ruled, Rules
from tiergate_engine.model import EngineModel
from tiergate_engine.step import Step

STOCK = Orders()
_NO_RULES = Rules(deadline_order=False, skip=False, relegate=False)


class _NoTime:
    """A `StepTime` by which steps take none: whoever plans by it cuts no chunk."""

    def seconds(self, step: Step) -> float:
        return 0.0

    def seconds_of(
        self,
        prefill_tokens: int,
        prefill_seqs: int,
        prefill_context_tokens: int,
        prefill_attention: float,
        decode_seqs: int,
        decode_kv_tokens: float,
    ) -> float:
        return 0.0

    def decode_seconds(self, decode_seqs: int, decode_kv_tokens: float) -> float:
        return 0.0

    def chunk_tokens(self, base: Step, within_s: float, context_tokens: int, limit_tokens: int) -> int:
        return limit_tokens if within_s >= 0.0 else 0


_STOCK_RULED = Ruled(_NO_RULES, _NoTime())


class Ordered:
    """The orders of one model. A model made with `EngineConfig.drive` can be driven; any other takes limits only.

    Attributes:
        orders: given last, whether they hold or not.
        budget_tokens: most tokens of the step that `before` was called for.
        refuses: why it is not driven whatever the orders say, a fault on purpose; None: it is.
    """

    def __init__(self, model: EngineModel) -> None:
        self.orders = STOCK
        self.budget_tokens = model.config.max_batched_tokens
        self.refuses: str | None = None
        self._model = model
        self._given_s: float | None = None
        self._in_force = STOCK
        self._digest: str | None = None
        self._drivable = model.config.drive is not None
        if self._drivable:
            model.drive_by(_STOCK_RULED)

    def give(self, orders: Orders, now_s: float) -> None:
        """Replace what was ordered, or say it again."""
        if orders is not self.orders:
            self._digest = None
        self.orders, self._given_s = orders, now_s

    def forget(self) -> None:
        """As if nobody had spoken to it."""
        self.orders, self._given_s = STOCK, None

    @property
    def digest(self) -> str | None:
        """Of the orders given last; None when there are none."""
        if self._given_s is None:
            return None
        if self._digest is None:
            self._digest = self.orders.digest
        return self._digest

    def age_s(self, now_s: float) -> float | None:
        """Since when the orders were given; None when nobody has."""
        return None if self._given_s is None else now_s - self._given_s

    def holding(self, now_s: float) -> Orders:
        """What is obeyed: the orders, as long as they have not lapsed."""
        age_s, lapse_s = self.age_s(now_s), self.orders.lapse_s
        lapsed = age_s is None or (lapse_s is not None and age_s > lapse_s)
        refused = self.orders.mode is Mode.DRIVEN and (self.refuses is not None or not self._drivable)
        return STOCK if lapsed or refused else self.orders

    def before(self, now_s: float) -> None:
        """Set the model's knobs for the next step."""
        orders = self.holding(now_s)
        if orders is not self._in_force:
            self._obey(orders)
        if orders.chunk_tokens is not None:
            most = self._model.config.max_batched_tokens
            self.budget_tokens = min(self._model.decodes + orders.chunk_tokens, most)
            self._model.set_budget(self.budget_tokens)

    def _obey(self, orders: Orders) -> None:
        self._in_force = orders
        if orders.mode is Mode.DRIVEN and orders.profile is not None:
            self._model.drive_by(Ruled(orders.rules, orders.profile))
        elif self._drivable:
            self._model.drive_by(_STOCK_RULED)
        self._model.set_running_cap(orders.running_cap)
        self._model.set_budget(None)
        self.budget_tokens = self._model.config.max_batched_tokens
