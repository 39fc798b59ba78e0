"""What all tests share: no blocking in event loops, uvloop, free ports, and servers as child processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
import uvloop
from blockbuster import BlockBuster
from hypothesis import settings

from deploy import server_process
from deploy.server_process import ServerProcess
from tests.servers import DataServer, Kind

ROOT = Path(__file__).resolve().parent.parent
OURS = [
    "tiergate_engine",
    "scheduling",
    "profiles",
    "state",
    "adapters",
    "gateway",
    "simulator",
    "loadgen",
    "tiergate",
]


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    """A call that blocks the event loop fails the test when one of our packages made it.

    Only our packages are watched: pytest, aiohttp and the tests themselves may read files as they like.
    """
    detector = BlockBuster(scanned_modules=OURS)
    detector.activate()
    try:
        yield
    finally:
        detector.deactivate()


def pytest_configure() -> None:
    """Let children hear SIGINT. Fail no example for its time: machines differ. Where CI is set, hypothesis draws
    the same ones each run."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script ignores SIGINT for what it starts in the background, and children would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if settings.get_current_profile_name() != "ci":
        settings.register_profile("tiergate", deadline=None)
        settings.load_profile("tiergate")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Async tests run on the loop the gateway runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a loopback port nobody listens on."""
    return server_process.free_port


class StartServer(Protocol):
    """Starts a server, waits until `ready_path` answers 200, and stops it when the test ends."""

    def __call__(
        self,
        command: Sequence[str],
        port: int,
        *,
        ready_path: str = "/healthz",
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 30.0,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> ServerProcess: ...


def _starter(stack: ExitStack, folder: Path) -> StartServer:
    def start(
        command: Sequence[str],
        port: int,
        *,
        ready_path: str = "/healthz",
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 30.0,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> ServerProcess:
        server = ServerProcess(
            command,
            f"http://127.0.0.1:{port}{ready_path}",
            folder / f"server-{port}.log",
            environment=environment,
            ready_timeout_s=ready_timeout_s,
            stop_signal=stop_signal,
        )
        return stack.enter_context(server)

    return start


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """Start servers as child processes; all of them are stopped when the test ends.

    Waiting blocks: in an async test call it through `asyncio.to_thread`, or start the server in a plain fixture.
    """
    with ExitStack() as stack:
        yield _starter(stack, tmp_path)


@pytest.fixture(scope="session")
def start_session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServer]:
    """`start_server` for servers that all tests of a run share."""
    with ExitStack() as stack:
        yield _starter(stack, tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="session")
def tiergate_command() -> list[str]:
    """The beginning of a `tiergate` command line under this interpreter."""
    return [sys.executable, "-m", "tiergate"]


@pytest.fixture(scope="session", autouse=True)
def _direct_loopback() -> Iterator[None]:
    """Loopback never goes through a proxy that the environment may name."""
    with pytest.MonkeyPatch.context() as patch:
        hosts = {*filter(None, os.environ.get("NO_PROXY", "").split(",")), "127.0.0.1", "localhost"}
        patch.setenv("NO_PROXY", ",".join(sorted(hosts)))
        patch.setenv("no_proxy", ",".join(sorted(hosts)))
        yield


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataServer]:
    """A real Redis that all tests of a run share: leave it running, and use a fleet of your own in it."""
    with DataServer(Kind.REDIS, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataServer]:
    """The same with a real Valkey."""
    with DataServer(Kind.VALKEY, tmp_path_factory.mktemp("valkey")) as server:
        yield server
