"""`tiergate check`: read a configuration, and explain what it means or what is wrong with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gateway.config import ConfigError, Settings, StoreKind
from gateway.requestlog import unwritable
from profiles import load
from tiergate.commands import UsageError
from tiergate.commands.serve import add_settings_arguments, settings_of
from tiergate.root import checked, store_address

if TYPE_CHECKING:
    from tiergate.commands import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "check",
        help="read a configuration, and explain what it means or what is wrong with it",
        description="Explain a configuration, contacting no engine. Ends with 2 when something in it is wrong.",
    )
    add_settings_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    try:
        checked(settings)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    path = settings.request_log
    problem = None if path is None else unwritable(path)
    if problem is not None:
        raise UsageError(f"request_log: {path}: {problem}")
    for line in explain(settings):
        print(line)
    return 0


def explain(settings: Settings) -> list[str]:
    """What a configuration means, line by line."""
    lines = [f"Listens on http://{settings.host}:{settings.port}.", "", "Tiers, tight to loose:"]
    for tier in settings.tiers:
        promise = "best effort: no promise"
        if tier.ttft_ms is not None or tier.tpot_ms is not None:
            first = "no promise" if tier.ttft_ms is None else f"{tier.ttft_ms:g} ms"
            each = "no promise" if tier.tpot_ms is None else f"{tier.tpot_ms:g} ms"
            promise = f"first token {first}, each token {each}; when that cannot be kept: {tier.on_miss.value}"
        default = " (default)" if tier.name == settings.default_tier else ""
        lines.append(f"  {tier.name}{default}: {promise}")
    lines += ["", "Backends:" if settings.backends else "Backends: none yet (give --backend URL)."]
    for backend in settings.backends:
        models = ", ".join(backend.models) or "asked of the engine"
        place = "starts in the pool" if backend.tier is None else f"starts in tier {backend.tier}"
        if backend.pinned:
            place = f"always in tier {backend.tier}"
        lines.append(f"  {backend.name}: {backend.url}, engine {backend.engine.value}, models {models}; {place}")
        lines.append(f"    {_profile_line(backend.profile)}")
    lines += ["", f"Policy: {settings.policy.name}, seed {settings.seed}."]
    lines.append(_shared(settings))
    keys = "anyone may use it" if not settings.keys else f"{len(settings.keys)} keys"
    admin = "closed (no admin_token)" if settings.admin_token is None else "open behind its token"
    lines.append(f"Access: {keys}; admin API {admin}.")
    lines.append(
        f"Limits: bodies up to {settings.limits.body_bytes} bytes; "
        f"on SIGTERM streams get {settings.drain_grace_s:g} s to end."
    )
    sinks = ["standard output"] if settings.log_requests else []
    sinks += [str(settings.request_log)] if settings.request_log is not None else []
    lines.append(f"Request log: {' and '.join(sinks) or 'none'}.")
    lines.append("The configuration can be served." if settings.backends else "The configuration is valid.")
    return lines


def _shared(settings: Settings) -> str:
    store, workers = settings.store, settings.workers
    processes = "One process" if workers == 1 else f"{workers} workers"
    match store.kind:
        case StoreKind.MEMORY:
            return f"{processes}; state in memory."
        case StoreKind.EMBEDDED:
            return f"{processes}; state in a Valkey that is started with them."
        case StoreKind.REDIS:
            return f"{processes}; state shared at {store_address(store)} as fleet {store.fleet}."


def _profile_line(name: str | None) -> str:
    if name is None:
        return "no profile: served at once from a cautious prior, calibrated after about 200 steps"
    profile = load(name)
    error = profile.p90_error
    told = "" if error is None else f", p90 error {error:.0%}"
    return f"profile {name}: {profile.file.model} on {profile.file.hardware}{told}"
