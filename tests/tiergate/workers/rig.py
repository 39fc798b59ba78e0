"""`tiergate serve --workers` as real processes, in front of emulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from deploy.server_process import ServerProcess, free_port
from tests.adversary.stand import ADMIN, CHAT, KEY, chat, start_engines, write_config

SERVE = (sys.executable, "-m", "tiergate", "serve")
_WAIT_S = 40.0
_LOOK_S = 0.05


@dataclass(slots=True)
class Service:
    """A supervisor and its workers."""

    supervisor: ServerProcess
    port: int
    config: Path

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def workers(self) -> list[int]:
        """Process ids of its workers, the oldest first."""
        return sorted(children(self.supervisor.pid, "tiergate.workers.worker"))

    def watchers(self) -> list[int]:
        """Process ids of what watches over its store."""
        return children(self.supervisor.pid, "tiergate.workers.watcher")

    def stores(self) -> list[int]:
        """Process ids of its store's servers."""
        return [pid for watcher in self.watchers() for pid in children(watcher, "valkey-server")]


def children(parent: int, wanted: str) -> list[int]:
    """Child processes in whose command line something stands."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == parent and wanted in (folder / "cmdline").read_bytes().decode():
                    found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, engines: int = 2, **more: object) -> Iterator[Service]:
    """Workers in front of emulated engines; `more` goes into the configuration."""
    folder.mkdir(exist_ok=True)
    ports = [free_port() for _ in range(engines)]
    port = free_port()
    config = folder / "tiergate.json"
    write_config(config, port, ports, **more)
    with start_engines(ports, folder):
        command = [*SERVE, "--config", str(config), "--quiet", *arguments]
        with ServerProcess(command, f"http://127.0.0.1:{port}/readyz", folder / "gateway.log") as supervisor:
            service = Service(supervisor, port, config)
            wait(lambda: "listening on" in supervisor.log())  # one worker answers before the others do
            yield service


@contextlib.asynccontextmanager
async def clients() -> AsyncIterator[aiohttp.ClientSession]:
    """Clients that open a connection for each request, or nothing would be shared out."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session


async def ask(session: aiohttp.ClientSession, service: Service, **fields: object) -> tuple[int, bytes]:
    """One chat request; status 0 when the connection broke."""
    try:
        async with session.post(
            service.base + CHAT, json=chat(**fields), headers={"authorization": f"Bearer {KEY}"}
        ) as answer:
            body = b""
            try:
                async for data in answer.content.iter_any():
                    body += data
            except aiohttp.ClientError:
                return 0, body
            return answer.status, body
    except aiohttp.ClientError as error:
        return 0, repr(error).encode()


async def stream(session: aiohttp.ClientSession, service: Service, tokens: int) -> tuple[int, bytes]:
    """One streamed answer of so many tokens."""
    return await ask(session, service, stream=True, max_tokens=tokens, ignore_eos=True)


def whole(answer: tuple[int, bytes], tokens: int) -> bool:
    """Whether a stream came to its end with all its tokens."""
    status, body = answer
    return status == 200 and body.endswith(b"data: [DONE]\n\n") and body.count(b'"content"') >= tokens


async def metrics(session: aiohttp.ClientSession, service: Service) -> dict[str, float]:
    """`/metrics`, by sample name and labels."""
    async with session.get(f"{service.base}/metrics") as answer:
        assert answer.status == 200
        text = await answer.text()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


async def admin(session: aiohttp.ClientSession, service: Service, path: str) -> tuple[int, bytes]:
    """GET below /admin/v1/."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    async with session.get(f"{service.base}/admin/v1/{path}", headers=headers) as answer:
        return answer.status, await answer.read()


async def ready(session: aiohttp.ClientSession, service: Service) -> int:
    """The status of `/readyz`; 0 when nobody answers."""
    try:
        async with session.get(f"{service.base}/readyz") as answer:
            return answer.status
    except aiohttp.ClientError:
        return 0


def wait(condition: Callable[[], bool]) -> None:
    """Wait until something is so; blocking."""
    deadline_s = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(_LOOK_S)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    await until_told(lambda: _now(condition))


async def until_told(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something that has to be asked for is so."""
    async with asyncio.timeout(_WAIT_S):
        while not await condition():  # noqa: ASYNC110 - what is asked is another process, which sets no event here
            await asyncio.sleep(_LOOK_S)


async def _now(condition: Callable[[], bool]) -> bool:
    return condition()


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
