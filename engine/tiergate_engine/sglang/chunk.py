"""A chunk size that can be set while SGLang runs: ``chunked_prefill_size`` in a POST to /set_internal_state.

SGLang's scheduler reads its `chunked_prefill_size` anew for every batch of prompts, so a change shows in the next
one. It is set in every rank alike, because every rank gets the same message. Two traps are kept out:

* Above the size at launch, buffers and graphs would be too small; below the alignment of chunks, a prompt would be
  cut to nothing and wait for ever. So a size has to be a multiple of both page and alignment and below that of the
  launch, or be that.
* 0.5.12 answers that it took a setting whether it did or not. The answer is set right for settings of ours.

With mixed chunks (``--enable-mixed-chunk``) the decodes of a step come out of its chunk, so a size below their
number lets no prompt in until some of them end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Protocol, TypeVar

NAME = "chunked_prefill_size"
STATE = "tiergate"
"""The member of a scheduler's internal state in which the plug-in tells what it takes."""
STATE_VERSION = 1


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
    """SGLang's scheduler, as far as it is read here. None is a server without chunks."""

    chunked_prefill_size: int | None
    page_size: int


AnswerT = TypeVar("AnswerT", bound=Answer)
RequestT = TypeVar("RequestT", bound=Request)
SchedulerT = TypeVar("SchedulerT", bound=Scheduler)
StateT = TypeVar("StateT", bound=State)


class LiveChunk:
    """The setting of one scheduler process. `warn` is told, once, when its insides are not as expected."""

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._warned = False
        self._launched: int | None = None

    def around_set(
        self, original: Callable[[SchedulerT, RequestT], AnswerT], scheduler: SchedulerT, request: RequestT
    ) -> AnswerT:
        """Take a chunk size out of the settings, and leave the others to SGLang; all are taken or none."""
        if NAME not in request.server_args:
            return original(scheduler, request)
        others = copy.copy(request)
        others.server_args = {name: value for name, value in request.server_args.items() if name != NAME}
        size = self._checked(scheduler, request.server_args[NAME])
        if size is None:
            others.server_args = {}
        answer = original(scheduler, others)
        if size is None:
            answer.updated = False
        elif answer.updated:
            scheduler.chunked_prefill_size = size
        return answer

    def after_get(self, state: StateT, scheduler: Scheduler, *_: object) -> StateT:
        """Tell which sizes are taken, and which one holds; nothing where none is."""
        sizes = self._sizes(scheduler)
        if sizes is not None:
            least, most = sizes
            told = {"now": scheduler.chunked_prefill_size, "least": least, "most": most, "multiple": least}
            state.internal_state[STATE] = {"version": STATE_VERSION, NAME: told}
        return state

    def _checked(self, scheduler: Scheduler, asked: object) -> int | None:
        sizes = self._sizes(scheduler)
        if sizes is None or isinstance(asked, bool) or not isinstance(asked, int):
            return None
        least, most = sizes
        fits = least <= asked < most and asked % least == 0
        return asked if fits or asked == most else None

    def _sizes(self, scheduler: Scheduler) -> tuple[int, int] | None:
        """The least size, of which those between are multiples, and that of the launch."""
        try:
            now, page = scheduler.chunked_prefill_size, scheduler.page_size
            # Sizes its chunks by itself, from latencies that it measured (with pipeline stages only).
            sizer = getattr(scheduler, "dynamic_chunk_sizer", None)
            if not isinstance(now, int) or now < 1 or sizer is not None:
                return None
            if self._launched is None:
                self._launched = now
            least = math.lcm(page, getattr(scheduler, "truncation_align_size", None) or 1)
            return (least, self._launched) if least <= self._launched else None
        # Whatever is not as it was read must not keep SGLang from answering.
        except Exception as error:  # noqa: BLE001
            if not self._warned:
                self._warned = True
                self._warn(f"SGLang's scheduler is not as expected, so its chunk size stays as it is: {error!r}")
            return None
