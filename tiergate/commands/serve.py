"""`tiergate serve`: run the gateway until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from gateway.app import Gateway, Wiring, running
from gateway.config import ConfigError, Settings, load, parse_backend_flag
from gateway.learning import Learned
from gateway.requestlog import LogFile
from tiergate.commands import CommandFailed, UsageError
from tiergate.root import check_profiles, wire

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

log = logging.getLogger("tiergate")

_SAVE_EVERY_S = 60.0


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that make up a configuration; `check` has the same ones."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file (docs/configuration.md)")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="URL[,key=value...]",
        help="an engine; may be repeated; keys: name, engine, model, profile, tier, api_key and limits",
    )
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8080; 0 takes a free one)")
    parser.add_argument("--policy", help="how requests are placed (polyserve)")
    parser.add_argument(
        "--store",
        metavar="memory|embedded|URL",
        help="where gateways share their state: redis://HOST:PORT, or embedded for a Valkey of its own (memory)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that serve the same port (1)")


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the gateway in front of one or more engines",
        description="Serve the OpenAI API in front of engines, every token on time.",
        epilog="SIGHUP reads the configuration again; SIGTERM waits for open streams, then stops.",
    )
    add_settings_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no line for each request on standard output")
    parser.set_defaults(func=run)


def settings_of(args: argparse.Namespace) -> Settings:
    """The configuration that arguments, environment and file make up. Raises UsageError."""
    try:
        overrides: dict[str, object] = {
            "host": args.host,
            "port": args.port,
            "store.url": args.store,
            "workers": args.workers,
        }
        if args.backend:
            overrides["backends"] = [parse_backend_flag(flag) for flag in args.backend]
        if args.policy:
            overrides["policy"] = {"name": args.policy}
        if getattr(args, "quiet", False):
            overrides["log_requests"] = False
        return load(args.config, os.environ, overrides)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    if not settings.backends:
        raise UsageError("no backend: give --backend http://host:port, or `backends` in a configuration file")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    log_file = _log_file(settings)
    try:
        wiring = replace(wire(settings), write_log=_sink(settings, log_file))
        uvloop.run(serve(args, settings, wiring, log_file))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise _cannot_listen(settings, error) from None
    except ExceptionGroup as group:
        # The gateway's tasks were running when the address was refused, so the error comes with theirs.
        cause = _alone(group)
        if not isinstance(cause, OSError):
            raise
        raise _cannot_listen(settings, cause) from None
    finally:
        if log_file is not None:
            log_file.close()
    return 0


def _log_file(settings: Settings) -> LogFile | None:
    path = settings.request_log
    if path is None:
        return None
    try:
        return LogFile(path)
    except OSError as error:
        raise UsageError(f"request_log: {path}: {error.strerror or error}") from None


def _sink(settings: Settings, log_file: LogFile | None) -> Callable[[bytes], None] | None:
    """Where the request log's lines go: standard output, a file, both, or nowhere (None)."""
    if log_file is None:
        return _write_log if settings.log_requests else None
    if not settings.log_requests:
        return log_file.write
    to_file = log_file.write

    def to_both(lines: bytes) -> None:
        try:
            to_file(lines)
        finally:
            _write_log(lines)

    return to_both


def _cannot_listen(settings: Settings, error: OSError) -> CommandFailed:
    return CommandFailed(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}")


def _alone(error: Exception) -> Exception:
    """The one error inside groups of one; the group where there are more."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def serve(
    args: argparse.Namespace, settings: Settings, wiring: Wiring, log_file: LogFile | None = None
) -> None:
    """Run until SIGTERM or SIGINT; a second one does not wait for streams. Raises OSError."""
    # What is alive now lives as long as the process; the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    again = asyncio.Event()
    reload = asyncio.Event()

    def on_stop() -> None:
        (again if stop.is_set() else stop).set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_stop)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    try:
        async with running(settings, wiring) as gateway, asyncio.TaskGroup() as tasks:
            log.info("listening on http://%s:%d, policy %s", settings.host, gateway.port, settings.policy.name)
            side = [tasks.create_task(_reload_on(reload, gateway, args, log_file), name="reload")]
            if isinstance(wiring.teachers, Learned) and settings.learned_state is not None:
                side.append(tasks.create_task(_save_often(wiring.teachers), name="save"))
            await stop.wait()
            log.info("stopping: waiting at most %.0f s for open streams", settings.drain_grace_s)
            await _drain(gateway, settings.drain_grace_s, again)
            for task in side:
                task.cancel()
    finally:
        if isinstance(wiring.teachers, Learned):
            await _save(wiring.teachers)


def _write_log(lines: bytes) -> None:
    sys.stdout.buffer.write(lines)
    sys.stdout.buffer.flush()


async def _drain(gateway: Gateway, grace_s: float, again: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(gateway.drain(grace_s))
        impatient = tasks.create_task(again.wait())
        await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        impatient.cancel()


async def _reload_on(
    reload: asyncio.Event, gateway: Gateway, args: argparse.Namespace, log_file: LogFile | None
) -> None:
    while True:
        await reload.wait()
        reload.clear()
        if log_file is not None:
            try:
                await asyncio.to_thread(log_file.reopen)
            except OSError as error:
                log.error("the request log goes on in the file that it had: %s", error)
        try:
            settings = await asyncio.to_thread(settings_of, args)
            await asyncio.to_thread(check_profiles, settings)
            if not settings.backends:
                raise UsageError("it names no backend")  # a file that is half written looks so
        except (UsageError, ConfigError) as error:
            log.error("the configuration stays as it was: %s", error)
            continue
        await gateway.reload(settings)


async def _save_often(learned: Learned) -> None:
    while True:
        await asyncio.sleep(_SAVE_EVERY_S)
        await _save(learned)


async def _save(learned: Learned) -> None:
    try:
        await learned.save()
    except OSError as error:
        log.warning("what was learned could not be saved: %s", error)
