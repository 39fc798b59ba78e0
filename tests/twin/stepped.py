"""An asyncio event loop on a virtual clock: time stands still while anything runs, and jumps when nothing does.

Everything must live in one process and on this one loop; sockets are real and on loopback. Before the clock jumps
to the next timer, every byte that was sent has been read (unless its reader has paused), every connection has been
accepted, and no thread is at work for the loop. So the network takes no time, however busy the machine is.

Sockets become readable in the order in which they were sent to, not in the kernel's. Together this makes a run
reproducible: the same program sees the same times and the same order of events.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Callable, Coroutine, Mapping
from heapq import heappop, heappush
from typing import Any, TypeVar

T = TypeVar("T")
_Address = tuple[object, object]  # of one end of a connection: (its own address, its peer's)

PATIENCE_S = 10.0
"""Real seconds to wait for the kernel or a thread before the run counts as stuck."""

_SNAP_S = 1e-9  # a timer this near to where a jump ends is where it was meant to end


class Stuck(RuntimeError):
    """Nothing is left that could ever happen, or the kernel does not deliver what was sent."""


class Clock:
    """Virtual seconds since the loop was made."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._timers_s: list[float] = []

    def set_timer(self, at_s: float) -> None:
        """Remember that something is to happen at `at_s`, so that a jump ends there and not a rounding off it."""
        heappush(self._timers_s, at_s)

    def jump(self, by_s: float) -> None:
        """Go forward to the timer that is `by_s` away."""
        target_s = self.now_s + by_s
        timers = self._timers_s
        while timers and timers[0] <= max(self.now_s, target_s - _SNAP_S):
            heappop(timers)
        self.now_s = timers[0] if timers and timers[0] <= target_s + _SNAP_S else target_s


class _End:
    """One end of a connection: a socket that tells the wire what it sends and reads."""

    def __init__(self, plain: socket.socket, wire: Wire) -> None:
        self._plain = plain
        self._wire = wire
        self._fd = plain.fileno()
        self.address: _Address = (plain.getsockname(), plain.getpeername())

    def __getattr__(self, name: str) -> Any:  # everything else is the plain socket's own
        return getattr(self._plain, name)

    def fileno(self) -> int:
        return self._plain.fileno()

    def send(self, data: bytes) -> int:
        sent = self._plain.send(data)
        self._wire.sent(self.address, sent)
        return sent

    def recv(self, size: int) -> bytes:
        try:
            data = self._plain.recv(size)
        except BlockingIOError:
            raise
        except OSError:
            self._wire.read(self.address, 0)
            raise
        self._wire.read(self.address, len(data))
        return data

    def shutdown(self, how: int) -> None:
        self._plain.shutdown(how)
        self._wire.finished(self.address)

    def close(self) -> None:
        self._plain.close()
        self._wire.closed(self.address, self._fd)


class Wire(selectors.BaseSelector):
    """A selector that knows what is on its way between the sockets of this process."""

    def __init__(self, clock: Clock) -> None:
        self.threads = 0  # at work for the loop
        self._clock = clock
        self._inner = selectors.DefaultSelector()
        self._fds: dict[_Address, int] = {}
        self._owned: set[int] = set()  # file descriptors of the ends
        self._connecting: set[int] = set()  # others that wait to be written to
        self._alone: set[_Address] = set()  # ends whose other end was not accepted yet
        self._gone: set[_Address] = set()
        self._unread: dict[_Address, int] = {}  # bytes, by the end that is to read them; oldest first
        self._finished: set[_Address] = set()  # ends that will read the end of the stream

    # --- what the ends tell --------------------------------------------------------------------------------

    def connected(self, plain: socket.socket) -> _End:
        """A connection was made or accepted."""
        end = _End(plain, self)
        self._fds[end.address] = plain.fileno()
        self._owned.add(plain.fileno())
        self._gone.discard(end.address)
        other = end.address[1], end.address[0]
        if other in self._alone:
            self._alone.remove(other)
        elif other not in self._fds and other not in self._gone:
            self._alone.add(end.address)
        return end

    def sent(self, address: _Address, size: int) -> None:
        to = address[1], address[0]
        if size and to not in self._gone:
            self._unread[to] = self._unread.get(to, 0) + size

    def read(self, address: _Address, size: int) -> None:
        """Bytes were read; none is the end of the stream, or of the connection."""
        left = self._unread.get(address, 0) - size
        if size and left > 0:
            self._unread[address] = left
            return
        self._unread.pop(address, None)
        if not size:
            self._finished.discard(address)
        elif address in self._finished:
            self._unread[address] = 0

    def finished(self, address: _Address) -> None:
        """An end sends nothing more."""
        to = address[1], address[0]
        if to not in self._gone:
            self._finished.add(to)
            self._unread.setdefault(to, 0)

    def closed(self, address: _Address, fd: int) -> None:
        self.finished(address)
        self._gone.add(address)
        self._alone.discard(address)
        self._unread.pop(address, None)
        self._finished.discard(address)
        if self._fds.get(address) == fd:
            del self._fds[address]
            self._owned.discard(fd)

    # --- what is on its way --------------------------------------------------------------------------------

    def _order(self) -> dict[int, int]:
        """File descriptors that must be readable, each with its place in the order of sending."""
        events = self._inner.get_map()
        expected: dict[int, int] = {}
        for place, address in enumerate(self._unread):
            fd = self._fds.get(address)
            if fd is not None and fd in events and events[fd].events & selectors.EVENT_READ:
                expected[fd] = place
        return expected

    # --- the selector --------------------------------------------------------------------------------------

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready at this instant; when nothing is, or will be, the clock goes `timeout` forward."""
        expected = self._order()
        ready = self._inner.select(0)
        while not expected.keys() <= {key.fd for key, _ in ready}:
            ready = self._wait()
        if not ready and timeout != 0 and (timeout is None or self.threads or self._connecting or self._alone):
            ready = self._wait()
        if not ready:
            if timeout:
                self._clock.jump(timeout)
            return []
        last = len(expected)
        return sorted(ready, key=lambda one: (expected.get(one[0].fd, last), one[0].fd))

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, in real time, for the kernel or a thread."""
        ready = self._inner.select(PATIENCE_S)
        if not ready:
            raise Stuck("nothing happens any more, and no timer is set")
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._inner.register(fileobj, events, data)
        if events & selectors.EVENT_WRITE and key.fd not in self._owned:
            self._connecting.add(key.fd)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._inner.unregister(fileobj)
        self._connecting.discard(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class SteppedLoop(asyncio.SelectorEventLoop):
    """See the module. `time()` begins at 0."""

    def __init__(self) -> None:
        self._clock = Clock()
        self._wire = Wire(self._clock)
        super().__init__(self._wire)

    def time(self) -> float:
        return self._clock.now_s

    def call_at(
        self, when: float, callback: Callable[..., object], *args: object, **more: Any
    ) -> asyncio.TimerHandle:
        self._clock.set_timer(when)
        return super().call_at(when, callback, *args, **more)

    def run_in_executor(  # type: ignore[override]  # types of arguments come as they go
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self._wire.threads += 1
        future.add_done_callback(self._thread_ended)
        return future

    def _thread_ended(self, _future: asyncio.Future[Any]) -> None:
        self._wire.threads -= 1

    def _make_socket_transport(self, sock: socket.socket, *args: Any, **more: Any) -> asyncio.Transport:
        # asyncio has no public place where both connected and accepted sockets pass by.
        make = super()._make_socket_transport  # type: ignore[misc]
        transport: asyncio.Transport = make(self._wire.connected(sock), *args, **more)
        return transport


def run_stepped(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a loop of its own."""
    with asyncio.Runner(loop_factory=SteppedLoop) as runner:
        return runner.run(main)
