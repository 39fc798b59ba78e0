"""The decodes of an engine as a plan sees them: what each wants of the next step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Decode(NamedTuple):
    """A running sequence that wants its next token.

    Attributes:
        kv_tokens: the context it reads in this step, the token being computed included.
        slack_s: seconds until its next token is due; negative when it is late, infinite without a promise.
        pace_s: seconds promised per token; infinite without a promise.
    """

    kv_tokens: int
    slack_s: float = math.inf
    pace_s: float = math.inf


class Decodes(Protocol):
    """All decodes of an engine as columns. Most steps ask for the least slack only, and the others cost time."""

    @property
    def kv_tokens(self) -> Sequence[int]:
        """See `Decode`, as what follows."""
        ...

    @property
    def least_slack_s(self) -> float:
        """Infinite when there are none."""
        ...

    def slacks_s(self) -> Sequence[float]: ...

    def paces_s(self) -> Sequence[float]: ...


class Listed:
    """Decodes as they are listed."""

    __slots__ = ("_decodes",)

    def __init__(self, decodes: Sequence[Decode]) -> None:
        self._decodes = decodes

    @property
    def kv_tokens(self) -> Sequence[int]:
        return [one.kv_tokens for one in self._decodes]

    @property
    def least_slack_s(self) -> float:
        return min([one.slack_s for one in self._decodes], default=math.inf)

    def slacks_s(self) -> Sequence[float]:
        return [one.slack_s for one in self._decodes]

    def paces_s(self) -> Sequence[float]:
        return [one.pace_s for one in self._decodes]
