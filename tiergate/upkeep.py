"""What a gateway process does beside serving: its log, reading its configuration again, saving what it learns."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Callable

from gateway.app import Gateway
from gateway.config import ConfigError, Settings
from gateway.learning import Learned
from gateway.requestlog import LogFile
from tiergate.commands import UsageError
from tiergate.root import check_profiles

log = logging.getLogger("tiergate")

_SAVE_EVERY_S = 60.0


def start_log(worker: int | None = None) -> None:
    """Log to standard error, under the worker's number where there are several."""
    who = "" if worker is None else f"worker {worker}: "
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s %(levelname)s {who}%(message)s"
    )


def calm_collector() -> None:
    """What is alive now lives as long as the process; the collector need not walk it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def open_request_log(settings: Settings) -> LogFile | None:
    """The file of the request log, if there is one. Raises UsageError."""
    path = settings.request_log
    if path is None:
        return None
    try:
        return LogFile(path)
    except OSError as error:
        raise UsageError(f"request_log: {path}: {error.strerror or error}") from None


def request_log_sink(settings: Settings, log_file: LogFile | None) -> Callable[[bytes], None] | None:
    """Where the request log's lines go: standard output, a file, both, or nowhere (None)."""
    if log_file is None:
        return _write_out if settings.log_requests else None
    if not settings.log_requests:
        return log_file.write
    to_file = log_file.write

    def to_both(lines: bytes) -> None:
        try:
            to_file(lines)
        finally:
            _write_out(lines)

    return to_both


def _write_out(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()


async def reload_on(
    wanted: asyncio.Event, gateway: Gateway, read: Callable[[], Settings], log_file: LogFile | None
) -> None:
    """Read the configuration again whenever `wanted` is set. One that cannot be used is told in the log."""
    while True:
        await wanted.wait()
        wanted.clear()
        if log_file is not None:
            try:
                await asyncio.to_thread(log_file.reopen)
            except OSError as error:
                log.error("the request log goes on in the file that it had: %s", error)
        try:
            settings = await asyncio.to_thread(read)
            await asyncio.to_thread(check_profiles, settings)
            if not settings.backends:
                raise UsageError("it names no backend")  # a file that is half written looks so
        except (UsageError, ConfigError) as error:
            log.error("the configuration stays as it was: %s", error)
            continue
        await gateway.reload(settings)


async def save_often(learned: Learned) -> None:
    """Save what was learned every minute."""
    while True:
        await asyncio.sleep(_SAVE_EVERY_S)
        await save(learned)


async def save(learned: Learned) -> None:
    """Save what was learned. A file that cannot be written is told in the log."""
    try:
        await learned.save()
    except OSError as error:
        log.warning("what was learned could not be saved: %s", error)
