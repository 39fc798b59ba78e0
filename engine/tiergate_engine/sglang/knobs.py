"""Two settings that can be changed while SGLang runs, in a POST to /set_internal_state.

* ``chunked_prefill_size``: most tokens of a chunk. The scheduler reads it anew for every batch of prompts, so a
  change shows in the next one. Above the size at launch, buffers and graphs would be too small; below the
  alignment of chunks, a prompt would be cut to nothing and wait for ever. So a size has to be a multiple of both
  page and alignment and below that of the launch, or be that.
* ``prefill_decode_interval``: how many steps of decodes come behind each batch of prompts, from 0.5.20 on. Without
  mixed chunks (``--enable-mixed-chunk``), chunks follow one another without a decode in between when it is 0, so
  that a smaller chunk alone protects nobody.

Every rank is handed the same message, so ranks stay in step. 0.5.12 answers that it took a setting whether it did
or not; the answer is set right for settings of ours.

With mixed chunks the decodes of a step come out of its chunk, so a size below their number lets no prompt in until
some of them end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

SIZE = "chunked_prefill_size"
INTERVAL = "prefill_decode_interval"
STATE = "tiergate"
"""The member of a scheduler's internal state in which the plug-in tells what it takes."""
STATE_VERSION = 1
_MOST_DECODES = 1_024  # between two chunks: more is a mistake


class Request(Protocol):
    """SGLang's SetInternalStateReq, as far as it is read here."""

    server_args: dict[str, object]


class Answer(Protocol):
    """SGLang's SetInternalStateReqOutput, as far as it is read here."""

    updated: bool


class State(Protocol):
    """SGLang's GetInternalStateReqOutput, as far as it is read here."""

    internal_state: dict[str, object]


class Scheduler(Protocol):
    """SGLang's scheduler, as far as it is read here. A size of None is a server without chunks.

    From 0.5.20 on it has `prefill_decode_interval` as well; `dynamic_chunk_sizer` is there with pipeline stages.
    """

    chunked_prefill_size: int | None
    page_size: int
    is_mixed_chunk: bool


AnswerT = TypeVar("AnswerT", bound=Answer)
RequestT = TypeVar("RequestT", bound=Request)
SchedulerT = TypeVar("SchedulerT", bound=Scheduler)
StateT = TypeVar("StateT", bound=State)


@dataclass(frozen=True, slots=True)
class _Launched:
    """What a scheduler was started with. `interval` is None where it has none; sizes are multiples of `least`."""

    size: int
    least: int
    interval: int | None


class LiveKnobs:
    """The settings of one scheduler process. `warn` is told, once, when its insides are not as expected."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._warned = False
        self._launched: _Launched | None = None

    def around_set(
        self, original: Callable[[SchedulerT, RequestT], AnswerT], scheduler: SchedulerT, request: RequestT
    ) -> AnswerT:
        """Take our settings out, and leave the others to SGLang; all are taken or none."""
        asked = {name: value for name, value in request.server_args.items() if name in (SIZE, INTERVAL)}
        if not asked:
            return original(scheduler, request)
        launched = self._of(scheduler)
        fits = launched is not None and _fits(launched, asked)
        others = copy.copy(request)
        rest = {name: value for name, value in request.server_args.items() if name not in asked}
        others.server_args = rest if fits else {}
        answer = original(scheduler, others)
        if not fits:
            answer.updated = False
        elif answer.updated:
            for name, value in asked.items():
                setattr(scheduler, name, value)
        return answer

    def after_get(self, state: StateT, scheduler: Scheduler, *_: object) -> StateT:
        """Tell what is taken, and what holds; nothing where nothing is."""
        launched = self._of(scheduler)
        if launched is None:
            return state
        sizes = {"now": scheduler.chunked_prefill_size, "least": launched.least}
        told: dict[str, object] = {
            "version": STATE_VERSION,
            "mixed": scheduler.is_mixed_chunk,
            SIZE: {**sizes, "most": launched.size, "multiple": launched.least},
        }
        if launched.interval is not None:
            told[INTERVAL] = {"now": getattr(scheduler, INTERVAL), "launched": launched.interval}
        state.internal_state[STATE] = told
        return state

    def _of(self, scheduler: Scheduler) -> _Launched | None:
        if self._launched is None and not self._warned:
            try:
                self._launched = _look(scheduler)
            # Whatever is not as it was read must not keep SGLang from answering.
            except Exception as error:  # noqa: BLE001
                self._warned = True
                self._warn(f"SGLang's scheduler is not as expected, so its chunks stay as they are: {error!r}")
        return self._launched


def _look(scheduler: Scheduler) -> _Launched | None:
    """What it was started with; None where it has no chunks, or sizes them itself. Raises what they raise."""
    size, page, interval = scheduler.chunked_prefill_size, scheduler.page_size, getattr(scheduler, INTERVAL, None)
    # Sizes its chunks by itself, from latencies that it measured.
    sizer = getattr(scheduler, "dynamic_chunk_sizer", None)
    if size is None or size < 1 or sizer is not None:
        return None
    least = math.lcm(page, getattr(scheduler, "truncation_align_size", None) or 1)
    if not hasattr(scheduler, "is_mixed_chunk") or not isinstance(interval, int | None):
        raise TypeError(f"is_mixed_chunk is not there, or {INTERVAL} is {interval!r}")
    return _Launched(size, least, interval) if least <= size else None


def _fits(launched: _Launched, asked: Mapping[str, object]) -> bool:
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        if name == SIZE:
            smaller = launched.least <= value < launched.size and value % launched.least == 0
            if not smaller and value != launched.size:
                return False
        elif launched.interval is None or not 0 <= value <= _MOST_DECODES:
            return False
    return True
