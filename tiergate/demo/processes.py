"""Child processes of the demo: they end when it ends, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp

from tiergate.commands import CommandFailed

_STOP_S = 8.0
_TAIL_LINES = 15


def tail(log: Path) -> str:
    """The last lines of a log, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


@contextlib.asynccontextmanager
async def tiergate(arguments: Sequence[str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`tiergate ARGUMENTS` in a process and session of its own, its output in `log`, stopped on the way out."""
    # Neither may be cut short: a start or a stop that is cancelled half-way leaves a process that nobody knows.
    loop = asyncio.get_running_loop()
    starting = loop.create_task(_start(arguments, log))
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _stop(await starting)
        raise
    try:
        yield process
    finally:
        stopping = loop.create_task(_stop(process))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping
            raise


async def _start(arguments: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    out = await asyncio.to_thread(log.open, "wb")
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tiergate", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        await asyncio.to_thread(out.close)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def ready(
    http: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process, log: Path, within_s: float = 30.0
) -> None:
    """Wait until `url` answers 200. Raises CommandFailed when the process ends first, or time is up."""
    try:
        async with asyncio.timeout(within_s):
            while True:
                if process.returncode is not None:
                    said = await asyncio.to_thread(tail, log)
                    raise CommandFailed(f"a process of the demo ended with {process.returncode}:\n{said}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.1)
    except TimeoutError:
        said = await asyncio.to_thread(tail, log)
        raise CommandFailed(f"{url} did not answer within {within_s:.0f} s:\n{said}") from None
