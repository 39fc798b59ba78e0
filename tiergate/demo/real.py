"""Real vLLM engines on this machine's CPU, for `make demo ENGINE=vllm`: from a source checkout only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tiergate.commands import CommandFailed
from tiergate.demo.processes import tail, tiergate
from tiergate.demo.run import Engines
from tiergate.demo.sizes import Size
from tiergate.ports import free_ports

_PROFILE_S = 60


@contextlib.asynccontextmanager
async def real_engines(size: Size, work: Path, say: Callable[[str], None]) -> AsyncIterator[Engines]:
    """Installs and starts vLLM servers with a tiny random model, and measures their latency profile.

    Raises CommandFailed.
    """
    try:
        from deploy.server_process import ServerFailed  # noqa: PLC0415
        from deploy.vllm_cpu.install import InstallFailed  # noqa: PLC0415
        from deploy.vllm_cpu.server import MODEL_NAME, prepare, vllm_server  # noqa: PLC0415
    except ImportError:
        raise CommandFailed("real engines need a source checkout: run `make demo ENGINE=vllm` there") from None
    try:
        say("installing the engine environment, where it is missing (2 GB once) ...")
        programs, model = await asyncio.to_thread(prepare)
        extra = ("--max-num-batched-tokens", str(size.chunk_tokens))
        ports = free_ports(size.backends)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        servers = [
            vllm_server(programs, model, port, work / f"vllm-{number}.log", extra=extra, cpus=str(number % 2))
            for number, port in enumerate(ports)
        ]
        say(f"starting {size.backends} vLLM servers on CPU (about a minute) ...")
        async with contextlib.AsyncExitStack() as stack:
            for server in servers:
                stack.push_async_callback(asyncio.to_thread, server.stop)
                await asyncio.to_thread(server.launch)
            for server in servers:
                await asyncio.to_thread(server.wait_ready)
            profile = await _measure(urls[0], MODEL_NAME, size.chunk_tokens, work, say)
            yield Engines(urls, MODEL_NAME, str(profile))
    except (InstallFailed, ServerFailed) as error:
        raise CommandFailed(str(error)) from error


async def _measure(url: str, model: str, chunk_tokens: int, work: Path, say: Callable[[str], None]) -> Path:
    say(f"measuring a latency profile of one of them ({_PROFILE_S} s) ...")
    profile, log = work / "profile.json", work / "profile.log"
    arguments = ["profile", "--url", url, "--model", model, "--out", str(profile), "--max-seqs", "32"]
    arguments += ["--chunk-tokens", str(chunk_tokens), "--max-seconds", str(_PROFILE_S)]
    async with tiergate(arguments, log) as process:
        if await process.wait() != 0:
            raise CommandFailed(f"tiergate profile failed:\n{await asyncio.to_thread(tail, log)}")
    return profile
