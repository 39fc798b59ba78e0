"""The supervisor of several workers: owns the sockets, keeps the workers alive, and replaces them one by one.

It serves nobody itself: the workers share its sockets, so while any of them lives nobody is refused. It puts
`/metrics` together, since no stream waits for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Coroutine, Sequence

import uvloop

from gateway.config import Settings, StoreKind
from tiergate.cli import DONE, USAGE
from tiergate.commands import CommandFailed
from tiergate.root import checked
from tiergate.workers.board import Board
from tiergate.workers.channel import Kind, Message, Topic
from tiergate.workers.child import Child
from tiergate.workers.embedded import EmbeddedStore
from tiergate.workers.metrics import Scrape, Told
from tiergate.workers.sockets import listen, port_of
from tiergate.workers.spec import Argument, WorkerSpec, arguments_of

log = logging.getLogger("tiergate")

_READY_S = 60.0
_SHORT_LIFE_S = 10.0
_FIRST_DELAY_S = 0.2
_LAST_DELAY_S = 10.0
_DEATHS = 3  # of workers before any has served: then it is no accident
_LATE_S = 10.0  # beyond its grace, in which a worker closes what it has
_SLOTS_EACH = 4  # a worker, its replacement, and two more that still have streams


def supervise(args: argparse.Namespace, settings: Settings) -> int:
    """Run workers until told to stop; the exit code.

    Raises ConfigError, CommandFailed, and OSError when the address cannot be had.
    """
    checked(settings)
    listeners = listen(settings.host, settings.port)
    try:
        store = EmbeddedStore() if settings.store.kind is StoreKind.EMBEDDED else None
        return uvloop.run(_supervise(args, settings, listeners, store))
    finally:
        for listener in listeners:
            listener.close()


async def _supervise(
    args: argparse.Namespace,
    settings: Settings,
    listeners: Sequence[socket.socket],
    store: EmbeddedStore | None,
) -> int:
    if store is None:
        arguments = arguments_of(args, settings.store.url.get_secret_value())
        failure = await Supervisor(arguments, settings, listeners).run()
    else:
        try:
            await store.start()
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(store.keep(), name="embedded-store")
                supervisor = Supervisor(arguments_of(args, store.url), settings, listeners, (store.lifeline,))
                failure = await supervisor.run()
                keeping.cancel()
        finally:
            await store.stop()
    if failure is not None:
        raise CommandFailed(failure)
    return DONE


class Supervisor:
    """Keeps `settings.workers` workers. `lifelines` are descriptors that each of them holds."""

    def __init__(
        self,
        arguments: dict[str, Argument],
        settings: Settings,
        listeners: Sequence[socket.socket],
        lifelines: Sequence[int] = (),
    ) -> None:
        self._arguments = arguments
        self._adopt_file = bool(arguments["adopt_file"])
        self._settings = settings
        self._listeners = listeners
        self._lifelines = lifelines
        self._board = Board.create(settings.workers * _SLOTS_EACH)
        self._slots = set(range(self._board.slots))  # those that are free
        self._children: set[Child] = set()
        self._posts: dict[int, Child] = {}  # by number: the one that serves
        self._delays_s: dict[int, float] = {}
        self._scrape = Scrape()
        self._deaths = 0  # of those that did not live long
        self._served = False
        self._failure: str | None = None
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()
        self._changed = asyncio.Event()  # a child has ended
        self._turning = asyncio.Lock()
        self._starts: set[asyncio.Task[None]] = set()

    async def run(self) -> str | None:
        """Until a signal, or until it is clear that workers cannot live: then the reason."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for signum in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(signum, self._on_stop)
                loop.add_signal_handler(signal.SIGHUP, self._on_reload)
                loop.add_signal_handler(signal.SIGUSR2, self._on_turn)
                for number in range(self._settings.workers):
                    self._begin(number)
                await self._stop.wait()
                await self._end_all()
        finally:
            self._board.close()
        return self._failure

    # --- signals -------------------------------------------------------------------------------------------

    def _on_stop(self) -> None:
        (self._at_once if self._stop.is_set() else self._stop).set()

    def _on_reload(self) -> None:
        for child in self._children:
            child.order(Kind.RELOAD)

    def _on_turn(self) -> None:
        if not self._stop.is_set():
            self._start(self._turn())

    def _start(self, work: Coroutine[object, object, None]) -> None:
        """Something that ends early when everything stops."""
        task = self._tasks.create_task(work)
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)

    # --- keeping workers -----------------------------------------------------------------------------------

    def _begin(self, number: int) -> None:
        self._start(self._fill(number))

    async def _fill(self, number: int) -> None:
        """Get a worker to serve under this number, however many die first."""
        while True:
            await asyncio.sleep(self._delays_s.get(number, 0.0))
            child = await self._ready_child(number)
            if child is not None:
                self._post(child)
                return
            if not self._served and self._deaths >= _DEATHS:
                self._give_up()
                return

    def _post(self, child: Child) -> None:
        """This one serves from now on."""
        if child.number in self._posts:  # a rolling restart was faster
            self._retire(child)
            return
        self._posts[child.number] = child
        if not self._served and len(self._posts) == self._settings.workers:
            self._served = True
            settings = self._settings
            log.info(
                "listening on http://%s:%d with %d workers, policy %s",
                settings.host,
                port_of(self._listeners[0]),
                settings.workers,
                settings.policy.name,
            )

    async def _ready_child(self, number: int) -> Child | None:
        """Start a worker and wait until it serves; None when it died or took too long."""
        slot = await self._take_slot()
        ours, theirs = socket.socketpair()
        spec = WorkerSpec(
            self._arguments,
            # Once: what was changed in the store since would be undone by every worker that is replaced.
            self._adopt_file and number == 0 and not self._served,
            number,
            slot,
            self._board.slots,
            theirs.fileno(),
            self._board.fd,
            tuple(listener.fileno() for listener in self._listeners),
        )
        try:
            child = await Child.start(spec, ours, theirs, self._lifelines)
        except OSError as error:
            log.error("worker %d cannot be started: %s", number, error)
            ours.close()
            self._slots.add(slot)
            self._slow_down(number)
            return None
        self._children.add(child)
        self._tasks.create_task(self._attend(child), name=f"worker-{number}")
        try:
            async with asyncio.timeout(_READY_S):
                await child.settled.wait()
        except TimeoutError:
            log.error("worker %d was not ready within %.0f s", number, _READY_S)
            child.kill()
        except asyncio.CancelledError:
            child.kill()
            raise
        return child if child.ready else None

    async def _take_slot(self) -> int:
        """A place on the board, as soon as one is free."""
        while not self._slots:
            self._changed.clear()
            await self._changed.wait()
        slot = min(self._slots)
        self._slots.remove(slot)
        return slot

    async def _attend(self, child: Child) -> None:
        """Hear a worker until it has ended, and see to its successor."""
        started_s = asyncio.get_running_loop().time()
        code = await child.watch(self._reply)
        lived_s = asyncio.get_running_loop().time() - started_s
        self._children.discard(child)
        self._board.write(child.slot, None)
        self._slots.add(child.slot)
        try:
            self._scrape.ended(child.name, child.last_text)
        except ValueError as error:
            log.error("what worker %d has counted is lost: %s", child.number, error)
        self._changed.set()
        if self._stop.is_set() or child.retiring:
            return
        if lived_s < _SHORT_LIFE_S:
            self._slow_down(child.number)
        else:
            self._delays_s[child.number] = 0.0
        log.error("worker %d (process %d) has ended: %s", child.number, child.process.pid, _ending(code))
        if not self._served and code == USAGE:
            self._give_up()  # it has said what is wrong, and would say it again
        elif self._posts.get(child.number) is child:
            del self._posts[child.number]
            self._scrape.restarts += 1
            self._begin(child.number)

    def _slow_down(self, number: int) -> None:
        """Whoever dies young is given more time before the next try."""
        delay_s = self._delays_s.get(number, 0.0)
        self._delays_s[number] = min(max(2 * delay_s, _FIRST_DELAY_S), _LAST_DELAY_S)
        self._deaths += 1

    def _give_up(self) -> None:
        self._failure = "the workers end before they serve; what they said stands above"
        self._stop.set()

    # --- replacing -----------------------------------------------------------------------------------------

    async def _turn(self) -> None:
        """Replace every worker, one after the other."""
        async with self._turning:
            for number in range(self._settings.workers):
                if not await self._replace(number):
                    log.error("the rolling restart stops at worker %d: its replacement does not serve", number)
                    return
            log.info("the rolling restart is done: every worker was replaced")

    async def _leave(self, number: int) -> None:
        """Replace the worker that was told to end."""
        async with self._turning:
            if not await self._replace(number):
                log.error("worker %d stays: its replacement does not serve", number)

    async def _replace(self, number: int) -> bool:
        """Start another worker, and retire the one that serves once the other one does. Whether it does."""
        old = self._posts.get(number)
        if old is None:
            return True  # it has died, and its successor is being started
        child = await self._ready_child(number)
        if child is None:
            return False
        if self._posts.get(number) is old:
            self._retire(self._posts.pop(number))
        self._post(child)
        return True

    def _retire(self, child: Child) -> None:
        child.order(Kind.RETIRE)
        self._tasks.create_task(self._end_late(child), name=f"retiring-{child.number}")

    async def _end_late(self, child: Child) -> None:
        """Kill a worker that does not end in its time."""
        try:
            async with asyncio.timeout(child.grace_s + _LATE_S):
                await child.process.wait()
        except TimeoutError:
            log.error("worker %d (process %d) did not end in time", child.number, child.process.pid)
            child.kill()

    # --- the end -------------------------------------------------------------------------------------------

    async def _end_all(self) -> None:
        """Let every worker drain; at once when told again."""
        for task in list(self._starts):
            task.cancel()
        if self._failure is None:
            log.info("stopping: waiting at most %.0f s for open streams", self._settings.drain_grace_s)
        for child in self._children:
            if child.ready:
                child.order(Kind.DRAIN)
                self._tasks.create_task(self._end_late(child), name=f"draining-{child.number}")
            else:
                child.kill()
        impatient = self._tasks.create_task(self._end_now(), name="impatient")
        while self._children:
            self._changed.clear()
            await self._changed.wait()
        impatient.cancel()

    async def _end_now(self) -> None:
        await self._at_once.wait()
        for child in self._children:
            child.order(Kind.STOP)

    # --- questions -----------------------------------------------------------------------------------------

    def _reply(self, child: Child, message: Message) -> None:
        if message.kind is Kind.LEAVING:
            if not self._stop.is_set() and self._posts.get(child.number) is child:
                self._start(self._leave(child.number))
        elif message.topic is Topic.METRICS:
            self._tasks.create_task(self._tell_metrics(child, message), name="metrics")
        elif message.topic is Topic.CARRIED:
            self._tasks.create_task(self._tell_carried(child, message), name="carried")
        elif message.topic is Topic.DECISION:
            self._tasks.create_task(self._tell_decision(child, message), name="decision")

    async def _tell_metrics(self, asker: Child, question: Message) -> None:
        asker.last_text = question.text
        others = [child for child in self._children if child is not asker and child.ready]
        answers = await asyncio.gather(*(child.metrics() for child in others))
        fresh = {asker, *(child for child, answered in zip(others, answers, strict=True) if answered)}
        # Nothing is awaited from here on: whoever ends later is counted here, who ended before is in the scrape.
        told = [
            Told(
                child.name,
                child.last_text,
                child in fresh,
                self._posts.get(child.number) is child,
                self._board.read(child.slot) or 0,
            )
            for child in sorted(self._children, key=_order)
        ]
        told += [Told(str(number), None, False, False, 0) for number in range(self._settings.workers)]
        try:
            text: str | None = self._scrape.text(told).decode()
        except ValueError as error:
            log.error("the workers' metrics cannot be put together: %s", error)
            text = None  # the asker tells its own
        asker.answer(question, text)

    async def _tell_carried(self, asker: Child, question: Message) -> None:
        others = [child for child in self._children if child is not asker and child.ready]
        answers = await asyncio.gather(*(child.carried() for child in others))
        asker.answer(question, "[" + ",".join(found for found in answers if found is not None) + "]")

    async def _tell_decision(self, asker: Child, question: Message) -> None:
        others = [child for child in self._children if child is not asker and child.ready]
        answers = await asyncio.gather(*(child.decision(question.text or "") for child in others))
        asker.answer(question, next((found for found in answers if found is not None), None))


def _order(child: Child) -> tuple[int, int]:
    return child.number, child.slot


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
