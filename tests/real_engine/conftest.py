"""One real vLLM on CPU for all tests here, and the gateway in front of it.

Everything here carries the mark `real_engine` and runs after all other tests. What cannot be installed or started
fails these tests; nothing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapters import registry
from adapters.vllm import VllmAdapter
from deploy.server_process import ServerProcess, free_port
from deploy.vllm_cpu import server as engines
from tests.conftest import StartServer

HERE = Path(__file__).resolve().parent
WHILE_IT_STARTS = {"test_vllm_schedulers.py", "test_transformers.py"}  # they need another program, and no quiet
START_TIMEOUT_S = 600.0  # the first test pays for the installation and the engine's start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here, and put it last, so that the engine runs beside nothing else."""
    here = [item for item in items if item.path.is_relative_to(HERE)]
    for item in here:
        item.add_marker(pytest.mark.real_engine)
        item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))
    here.sort(key=lambda item: item.path.name not in WHILE_IT_STARTS)
    items[:] = [item for item in items if not item.path.is_relative_to(HERE)] + here


@dataclass(frozen=True, slots=True)
class EngineFiles:
    """The engine environment's programs and the tiny model."""

    programs: Path
    model: Path


@dataclass(frozen=True, slots=True)
class RealEngine:
    """A running engine. `model` is the name to ask it for."""

    url: str
    model: str
    log_path: Path
    files: EngineFiles

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@pytest.fixture(scope="session")
def engine_files() -> EngineFiles:
    """Installs what is missing."""
    programs, model = engines.prepare()
    return EngineFiles(programs, model)


@pytest.fixture(scope="session")
def starting(
    engine_files: EngineFiles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess | None]:
    """The engine of `vllm`, launched and not waited for: its start is most of what these tests take. None where
    there is one that runs already."""
    if os.environ.get("REAL_VLLM_URL"):
        yield None
        return
    server = engines.vllm_server(
        engine_files.programs,
        engine_files.model,
        free_port(),
        tmp_path_factory.mktemp("vllm") / "vllm.log",
        extra=("--enable-prefix-caching",),
        development=True,
        driven=True,
    )
    try:
        server.launch()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def vllm(engine_files: EngineFiles, starting: ServerProcess | None) -> RealEngine:
    """A real vLLM: stock but for the plug-in that keeps it from starving its neighbours, and for Tiergate's
    scheduler, which fills steps as vLLM's does until somebody gives orders. It caches prefixes, in blocks of 128
    tokens, so a test that repeats a longer prompt gives it a `cache_salt` where that matters.

    While tests are being written, REAL_VLLM_URL names one that runs already, so that each try does not wait
    for another: `python deploy/vllm_cpu/server.py --development --driven --caching --port 8100`.
    """
    if starting is None:
        running = os.environ["REAL_VLLM_URL"]
        return RealEngine(running, engines.MODEL_NAME, engines.ROOT / ".engine" / "vllm.log", engine_files)
    starting.wait_ready()
    url = starting.ready_url.removesuffix("/health")
    return RealEngine(url, engines.MODEL_NAME, starting.log_path, engine_files)


@dataclass(frozen=True, slots=True)
class RealGateway:
    """A running `tiergate serve`."""

    url: str


@pytest.fixture(scope="session")
def gateway(vllm: RealEngine, start_session_server: StartServer, tiergate_command: list[str]) -> RealGateway:
    """The gateway as a user starts it: one flag, no file."""
    port = free_port()
    start_session_server(
        [*tiergate_command, "serve", "--backend", vllm.url, "--port", str(port)], port, ready_path="/readyz"
    )
    return RealGateway(f"http://127.0.0.1:{port}")


@pytest.fixture
async def adapter(vllm: RealEngine) -> AsyncIterator[VllmAdapter]:
    """Tiergate's adapter to the real vLLM, alone."""
    found = await registry.detect(vllm.url)
    assert isinstance(found, VllmAdapter)
    yield found
    await found.close()
