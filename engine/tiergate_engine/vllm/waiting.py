"""The queue of a driven engine: by the time the next token is due, those whose promise is given up last."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import islice

from tiergate_engine.vllm.promises import EngineRequest, next_due_s

_Entry = tuple[bool, float, int, float, int, EngineRequest]


class DeadlineQueue:
    """Takes the place of vLLM's waiting queue, with the same methods.

    The order is (given up, due, priority, arrival, order of coming). Requests without a promise are due never, so
    they stand behind those with one, by priority and arrival as in vLLM. Putting a request in front means nothing
    here, as in vLLM's queue by priority.
    """

    def __init__(self, requests: Iterable[EngineRequest] = ()) -> None:
        self._entries: list[_Entry] = []
        self._entry_of: dict[EngineRequest, _Entry] = {}
        self._come = 0
        for request in requests:
            self.add_request(request)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request."""
        self._add(request, request.tiergate_due.relegated)

    def _add(self, request: EngineRequest, given_up: bool) -> None:
        self._come += 1
        entry = (given_up, next_due_s(request), request.priority, request.arrival_time, self._come, request)
        insort(self._entries, entry)
        self._entry_of[request] = entry

    def give_up(self, request: EngineRequest) -> None:
        """Put a request that can no longer be on time behind all that can."""
        self.remove_request(request)
        self._add(request, True)

    def given_up(self, request: EngineRequest) -> bool:
        """Whether a queued request's promise is given up."""
        return self._entry_of[request][0]

    def first(self, count: int) -> list[EngineRequest]:
        """The first `count` requests, in order."""
        return [entry[-1] for entry in islice(self._entries, count)]

    def pop_request(self) -> EngineRequest:
        """Take the first one out. Raises IndexError when there is none."""
        request = self._entries.pop(0)[-1]
        del self._entry_of[request]
        return request

    def peek_request(self) -> EngineRequest:
        """The first one. Raises IndexError when there is none."""
        return self._entries[0][-1]

    def prepend_request(self, request: EngineRequest) -> None:
        """Queue a request that vLLM preempted or passed over."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[EngineRequest]) -> None:
        """Queue the requests that vLLM passed over, from the last one to the first."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: EngineRequest) -> None:
        """Take a request out. Raises KeyError when it is not queued."""
        entry = self._entry_of.pop(request)
        del self._entries[bisect_left(self._entries, entry)]

    def remove_requests(self, requests: Iterable[EngineRequest]) -> None:
        """Take out those of the requests that are queued."""
        for request in requests:
            if request in self._entry_of:
                self.remove_request(request)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[EngineRequest]:
        return iter([entry[-1] for entry in self._entries])
