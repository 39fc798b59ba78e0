"""Real processes to attack: emulated engines, and `tiergate serve` in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson

from deploy.server_process import ServerProcess, free_port

MODEL = "Qwen/Qwen3-32B"
PROFILE = "rtxpro6000-qwen3-32b-bf16"
KEY = "sk-a"
ADMIN = "adm"
TIERS = (("t75", 75, 1500), ("t100", 100, 2000), ("t150", 150, 3000), ("t300", 300, 5000))
CHAT = "/v1/chat/completions"
_TIERGATE = (sys.executable, "-m", "tiergate")


def chat(**fields: object) -> dict[str, object]:
    """A small good chat request, with fields changed."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}


def http(
    body: object,
    path: str = CHAT,
    *,
    method: str = "POST",
    headers: Sequence[bytes] = (),
    key: bytes = KEY.encode(),
) -> bytes:
    """One whole HTTP request as bytes, after which the connection is closed."""
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    head = [
        f"{method} {path} HTTP/1.1".encode(),
        b"host: x",
        b"connection: close",
        b"content-type: application/json",
        b"authorization: Bearer " + key,
        *headers,
        b"content-length: %d" % len(data),
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + data


def status_of(answer: bytes) -> int:
    """The status of a raw answer; 0 when the connection was closed without one."""
    words = answer.split(None, 2)
    return int(words[1]) if len(words) > 1 and answer.startswith(b"HTTP/") else 0


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


@dataclass(slots=True)
class Stand:
    """A gateway, and the engines behind it (one process)."""

    gateway: ServerProcess
    engines: ServerProcess
    port: int
    config: Path
    log_from: int = 0  # how much of the gateway's log earlier tests have made

    async def send(self, data: bytes, *, half_closed: bool = False, wait_s: float = 20.0) -> bytes:
        """Everything that comes back on one connection until it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
                if half_closed:
                    writer.write_eof()
            async with asyncio.timeout(wait_s):
                with contextlib.suppress(ConnectionError):
                    return await reader.read(-1)
            return b""
        finally:
            writer.close()

    async def state(self) -> dict[str, object]:
        """`GET /admin/v1/state`."""
        answer = await self.send(http(b"", "/admin/v1/state", method="GET", key=ADMIN.encode()))
        found: dict[str, object] = orjson.loads(body_of(answer))
        return found

    async def settled(self) -> None:
        """Wait until nothing is open, then check that nothing was lost and nothing broke inside."""
        deadline_s = time.monotonic() + 20.0
        while True:
            state = await self.state()
            requests, backends = state["requests"], state["backends"]
            assert isinstance(requests, dict)
            assert isinstance(backends, list)
            idle = not requests["held"] and not requests["running"]
            if idle and all(one["load"] == 0 and one["running"] == 0 for one in backends):
                break
            assert time.monotonic() < deadline_s, state
            await asyncio.sleep(0.05)
        assert requests["conserved"], requests
        assert all(not one["residents"] and not one["peak_kv_tokens"] for one in backends), backends
        log = self.gateway.log()[self.log_from :]
        assert "Traceback" not in log, log[-4000:]


def write_config(path: Path, port: int, backends: Sequence[int], **more: object) -> None:
    """A configuration with the tiers of these tests."""
    settings: dict[str, object] = {
        "port": port,
        "backends": [
            {"url": f"http://127.0.0.1:{one}", "name": f"e{number}", "profile": PROFILE}
            for number, one in enumerate(backends)
        ],
        "tiers": [{"name": name, "tpot_ms": tpot, "ttft_ms": ttft} for name, tpot, ttft in TIERS],
        "default_tier": "t150",
        "keys": [{"key": KEY, "tenant": "a"}],
        "admin_token": ADMIN,
        **more,
    }
    path.write_bytes(orjson.dumps(settings))


def start_engines(ports: Sequence[int], folder: Path, *flags: str) -> ServerProcess:
    """Emulated engines in one process. Leave the result to end them."""
    numbers = ",".join(map(str, ports))
    command = [*_TIERGATE, "emulate", "--profile", PROFILE, "--ports", numbers]
    command += ["--max-num-batched-tokens", "512", *flags]
    return ServerProcess(command, f"http://127.0.0.1:{ports[0]}/health", folder / f"engines-{numbers}.log")


@contextlib.contextmanager
def standing(folder: Path, *flags: str, engines: int = 2, **more: object) -> Iterator[Stand]:
    """A gateway in front of emulated engines with these flags; `more` goes into its configuration."""
    ports = [free_port() for _ in range(engines)]
    port = free_port()
    config = folder / "tiergate.json"
    write_config(config, port, ports, **more)
    with start_engines(ports, folder, *flags) as behind:
        command = [*_TIERGATE, "serve", "--config", str(config), "--quiet"]
        front = ServerProcess(command, f"http://127.0.0.1:{port}/readyz", folder / "gateway.log")
        with front as gateway:
            yield Stand(gateway, behind, port, config)


def tiergate(*arguments: str, timeout_s: float = 60.0) -> tuple[int, str]:
    """Run a command to its end: its exit code, and all it said."""
    done = subprocess.run(
        [*_TIERGATE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout.decode(errors="replace")


async def cut_chat(
    session: aiohttp.ClientSession, port: int, body: dict[str, object], headers: dict[str, str], cut_s: float
) -> int | None:
    """Send a chat request and hang up after `cut_s`; its status, if it came."""
    status = None
    url = f"http://127.0.0.1:{port}{CHAT}"
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(cut_s), session.post(url, json=body, headers=headers) as answer:
            status = answer.status
            await answer.read()
    return status


@contextlib.contextmanager
def stopped(process: ServerProcess) -> Iterator[None]:
    """The process stands still (SIGSTOP) inside the block."""
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)
