"""Sees to it that a process a test started does not outlive the test run, however the run ends."""

from __future__ import annotations

import contextlib
import subprocess


class Guard:
    """A process that waits for the end of a pipe which the test run holds, and then kills whom it guards."""

    def __init__(self, pid: int) -> None:
        # `read` succeeds when `dismiss` writes a line, and fails when this process is gone with its end of it.
        self._process = subprocess.Popen(
            ["sh", "-c", 'read -r _ || kill -9 "$0"', str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Send it home, before the guarded process is reaped: until then its id cannot be another's."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(b"\n")
            pipe.flush()
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        self._process.wait()
