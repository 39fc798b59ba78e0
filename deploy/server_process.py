"""A server as a child process: started, waited for, its log kept, and ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tiergate.ports import free_ports

POLL_S = 0.1
LOG_TAIL_CHARACTERS = 4000


class ServerFailed(Exception):
    """The server ended, or did not become ready in time. The message ends with the tail of its log."""


def free_port() -> int:
    """A loopback TCP port that nobody listens on at this moment."""
    return free_ports(1)[0]


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy
    try:
        with direct.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class ServerProcess:
    """One server process in a process group of its own; a context manager that starts and stops it.

    `ready_url` answers 200 once the server serves. The group gets `stop_signal`, then SIGKILL after `grace_s`.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready_url: str,
        log_path: Path,
        *,
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 30.0,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_s: float = 15.0,
    ) -> None:
        self.command = list(command)
        self.ready_url = ready_url
        self.log_path = log_path
        self._environment = {**os.environ, **(environment or {})}
        self._ready_timeout_s = ready_timeout_s
        self._stop_signal = stop_signal
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises RuntimeError before `launch`."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs or before it was started. Negative for a signal, as in subprocess."""
        return None if self._process is None else self._process.poll()

    def log(self) -> str:
        """All it has written to stdout and stderr."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def launch(self) -> None:
        """Start the process without waiting for it."""
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until `ready_url` answers. Raises ServerFailed; the process is stopped then."""
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            if self.poll() is not None:
                code = self.poll()
                self.stop()
                raise ServerFailed(f"{self.command[0]} ended with {code} before it was ready:\n{self._tail()}")
            if _answers(self.ready_url):
                return
            time.sleep(POLL_S)
        self.stop()
        raise ServerFailed(f"{self.ready_url} did not answer within {self._ready_timeout_s} s:\n{self._tail()}")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server process alone."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the process to end by itself; its exit code. Raises subprocess.TimeoutExpired."""
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        """End the process and everything left of its group. Idempotent."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(self._stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived it
        self._process.wait()

    def _tail(self) -> str:
        return self.log()[-LOG_TAIL_CHARACTERS:]

    def __enter__(self) -> Self:
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
