"""One process of the stand: started again and again on the same port, killed, stopped in its tracks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import aiohttp

from tests.guard import Guard

_POLL_S = 0.05
_READY_S = 30.0
_STOP_S = 15.0
_TAIL_CHARACTERS = 3000


class StartFailed(Exception):
    """A process ended, or did not become ready. The message ends with the tail of its log."""


class Actor(Protocol):
    """Something that faults happen to."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None:
        """Start it (again) and wait until it is ready."""
        ...

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        ...

    def pause(self) -> None:
        """SIGSTOP."""
        ...

    def resume(self) -> None:
        """SIGCONT."""
        ...


class Process:
    """An HTTP server as an `Actor`. It dies with the test run, however the run ends."""

    def __init__(self, name: str, command: Sequence[str], ready_url: str, log: Path, mark: str) -> None:
        """`mark` goes into its environment, so that it and its children are found again (`left_over`)."""
        self._name = name
        self._command = list(command)
        self._ready_url = ready_url
        self._log = log
        self._mark = mark
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def ended_by_itself(self) -> int | None:
        """Its exit code, when it has ended and nobody killed it."""
        return None if self._process is None else self._process.poll()

    def log(self) -> str:
        """All it has written, over all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def start(self) -> None:
        """Raises StartFailed."""
        await asyncio.to_thread(self._launch)
        deadline_s = time.monotonic() + _READY_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as http:
            while time.monotonic() < deadline_s:
                if self._process is None or self._process.poll() is not None:
                    raise StartFailed(f"{self._name} ended before it was ready:\n{self._tail()}")
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(self._ready_url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(_POLL_S)
        raise StartFailed(f"{self._name} was not ready within {_READY_S:.0f} s:\n{self._tail()}")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def stop(self) -> int | None:
        """SIGTERM, and wait; its exit code (None when it did not run). Killed when it takes too long."""
        process = self._process
        if process is None:
            return None
        self.resume()
        process.terminate()
        try:
            return await asyncio.to_thread(process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _launch(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: self._mark},
                start_new_session=True,
            )
        self._guard = Guard(self._process.pid)

    def _ended(self) -> None:
        """Reap it."""
        process, guard = self._process, self._guard
        self._process = self._guard = None
        if guard is not None:
            guard.dismiss()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)

    def _tail(self) -> str:
        return self.log()[-_TAIL_CHARACTERS:]


MARK = "CHAOS_RUN"
"""The environment variable that every process of a run carries; `TIERGATE_*` are the gateway's settings."""


def left_over(mark: str) -> list[str]:
    """Processes of this run that still live, with their command lines (Linux)."""
    found = []
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{folder.name}: {line.strip()}")
    return found
