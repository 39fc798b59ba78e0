"""`tiergate serve`: run the gateway until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from gateway.app import Gateway, running
from gateway.config import ConfigError, Settings, StoreKind, load, parse_backend_flag
from gateway.learning import Learned
from gateway.requestlog import LogFile
from tiergate.commands import CommandFailed, UsageError
from tiergate.root import Incarnation, assemble
from tiergate.upkeep import (
    calm_collector,
    open_request_log,
    reload_on,
    request_log_sink,
    save,
    save_often,
    start_log,
)
from tiergate.workers.supervisor import supervise

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

log = logging.getLogger("tiergate")


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
        epilog="SIGHUP reads the configuration again; SIGTERM waits for open streams, then stops; SIGUSR2 "
        "replaces the workers one by one.",
    )
    add_settings_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no line for each request on standard output")
    parser.add_argument(
        "--adopt-file",
        action="store_true",
        help="tiers, backends, keys and policy of this configuration replace those that the store has",
    )
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
    if not settings.backends and settings.store.kind is not StoreKind.REDIS:
        raise UsageError("no backend: give --backend http://host:port, or `backends` in a configuration file")
    start_log()
    try:
        if settings.workers > 1 or settings.store.kind is StoreKind.EMBEDDED:
            return supervise(args, settings)
        log_file = open_request_log(settings)
        try:
            uvloop.run(serve(args, settings, log_file))
        finally:
            if log_file is not None:
                log_file.close()
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
    return 0


def _cannot_listen(settings: Settings, error: OSError) -> CommandFailed:
    return CommandFailed(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}")


def _alone(error: Exception) -> Exception:
    """The one error inside groups of one; the group where there are more."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def serve(args: argparse.Namespace, settings: Settings, log_file: LogFile | None) -> None:
    """Run until SIGTERM or SIGINT; a second one does not wait for streams. Raises ConfigError and OSError."""
    made = await assemble(settings, Incarnation.of(adopt_file=args.adopt_file))
    wiring = replace(made, write_log=request_log_sink(settings, log_file))
    calm_collector()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    again = asyncio.Event()
    reload = asyncio.Event()

    def on_stop() -> None:
        (again if stop.is_set() else stop).set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_stop)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    # Meant for workers, and without a handler it would kill.
    loop.add_signal_handler(signal.SIGUSR2, log.warning, "SIGUSR2 replaces workers, and there are none")
    try:
        async with running(settings, wiring) as gateway, asyncio.TaskGroup() as tasks:
            log.info("listening on http://%s:%d, policy %s", settings.host, gateway.port, settings.policy.name)
            side = [
                tasks.create_task(reload_on(reload, gateway, partial(settings_of, args), log_file), name="reload")
            ]
            if isinstance(wiring.teachers, Learned) and settings.learned_state is not None:
                side.append(tasks.create_task(save_often(wiring.teachers), name="save"))
            await stop.wait()
            log.info("stopping: waiting at most %.0f s for open streams", settings.drain_grace_s)
            await _drain(gateway, settings.drain_grace_s, again)
            for task in side:
                task.cancel()
    finally:
        if isinstance(wiring.teachers, Learned):
            await save(wiring.teachers)


async def _drain(gateway: Gateway, grace_s: float, again: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        draining = tasks.create_task(gateway.drain(grace_s))
        impatient = tasks.create_task(again.wait())
        await asyncio.wait({draining, impatient}, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        impatient.cancel()
