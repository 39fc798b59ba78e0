"""Speaking with an engine's Tiergate plug-in: orders go in, its state and the facts of its steps come out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from adapters.contract import Failure, Unsupported, UpstreamError
from adapters.exchange import Answer
from tiergate_engine.control import (
    ORDERS_PATH,
    STATE_PATH,
    STEPS_PATH,
    ControlError,
    EngineState,
    Orders,
    StepFacts,
)

_Document = TypeVar("_Document")
_NO_PLUGIN = frozenset({404, 405, 501})

Ask = Callable[[str, str, bytes], Awaitable[Answer]]
"""One exchange with the engine: method, path, body. Raises UpstreamError."""


class EngineControl:
    """The plug-in's routes. What is not told anew stays as it was ordered last."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.orders = Orders()
        self.drivable = False

    async def find(self) -> EngineState | None:
        """Ask whether the plug-in is there; None when it is not, or speaks a version that is not known here.

        `drivable` then says whether it obeys orders. Raises UpstreamError when the engine does not answer.
        """
        self.drivable = False
        answer = await self._ask("GET", STATE_PATH, b"")
        if answer.status != 200:
            return None
        try:
            state = EngineState.from_json(answer.body)
        except ControlError:
            return None
        self.drivable = state.tested
        return state

    async def give(self, orders: Orders) -> EngineState:
        """Give orders; they replace those before. Raises Unsupported without the plug-in, or UpstreamError."""
        self._require()
        state = _read(EngineState.from_json, await self._body("PUT", ORDERS_PATH, orders.to_json().encode()))
        if state.orders_digest != orders.digest:
            raise Unsupported(f"orders: the engine does not obey them ({state.note or 'it does not say why'})")
        self.orders = orders
        return state

    async def state(self) -> EngineState:
        """How the engine is and what it obeys. Raises Unsupported without the plug-in, or UpstreamError."""
        self._require()
        return _read(EngineState.from_json, await self._body("GET", STATE_PATH, b""))

    async def steps(self, since: int) -> StepFacts:
        """The engine's steps from number `since` on. Raises Unsupported without the plug-in, or UpstreamError."""
        self._require()
        return _read(StepFacts.from_json, await self._body("GET", f"{STEPS_PATH}?since={since}", b""))

    def _require(self) -> None:
        if not self.drivable:
            raise Unsupported("the engine has no Tiergate plug-in that obeys orders")

    async def _body(self, method: str, path: str, body: bytes) -> bytes:
        answer = await self._ask(method, path, body)
        if answer.status in _NO_PLUGIN:
            self.drivable = False
            raise Unsupported("the engine has no Tiergate plug-in any more: it was started anew without it")
        if answer.status != 200:
            failure = Failure.REJECTED if answer.status in {400, 401, 403} else Failure.BROKEN
            raise UpstreamError(failure, f"{method} {path} was answered {answer.status}", answer.status)
        return answer.body


def _read(reader: Callable[[bytes], _Document], body: bytes) -> _Document:
    try:
        return reader(body)
    except ControlError as error:
        raise UpstreamError(Failure.BROKEN, f"what the engine's plug-in says cannot be read: {error}") from error
