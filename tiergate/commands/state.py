"""`tiergate state audit`: compare what the shared store counts with what replicas carry and engines report."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from gateway.config import ConfigError, Settings, StoreKind, load
from state.contract import StoreUnavailable
from state.redis.address import BadStoreUrl, parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.inventory import InventoryReader
from tiergate.audit.compare import compare
from tiergate.audit.look import Looks, Whom, look
from tiergate.audit.readings import Readings
from tiergate.audit.show import as_json, lines
from tiergate.commands import UsageError

if TYPE_CHECKING:
    from tiergate.commands import Subparsers

CLEAN = 0
DIFFERENCES = 1
CANNOT_LOOK = 2

_DESCRIPTION = """\
Compare, for every backend, what the shared store counts with what each gateway replica says that it carries and
with what the engine reports, and name every difference, its likely cause, and whether it heals by itself.

Replicas are found through the store and are asked over their admin API, so the admin token is needed: from the
configuration file, or from TIERGATE_ADMIN_TOKEN. Nothing is written anywhere.

Ends with 0 when everything agrees, 1 when there are differences, and 2 when the store, or anybody who had to be
asked, does not answer.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add `state` and what it can do."""
    parser = subparsers.add_parser("state", help="look into the state that replicas share")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    audit = actions.add_parser(
        "audit",
        help="compare the store with what replicas carry and engines report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.set_defaults(func=run)
    audit.add_argument("--config", type=Path, metavar="FILE", help="the gateways' configuration")
    audit.add_argument("--store", metavar="URL", help="the store, such as redis://HOST:PORT")
    audit.add_argument("--fleet", metavar="NAME", help="the fleet's name in the store (default)")
    audit.add_argument(
        "--gateway",
        action="append",
        metavar="URL",
        help="a gateway that is not found by itself; may be repeated",
    )
    audit.add_argument("--readings", type=int, default=4, metavar="N", help="how often all is read (%(default)s)")
    audit.add_argument(
        "--pause-s", type=float, default=0.4, metavar="S", help="how long lies between two readings (%(default)s)"
    )
    audit.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Look, compare and tell. Raises UsageError."""
    if args.readings < 2 or not 0 < args.pause_s <= 60:
        raise UsageError("--readings must be at least 2, and --pause-s more than 0 and at most 60")
    settings = _settings(args)
    try:
        read = uvloop.run(_read(args, settings))
    except StoreUnavailable as error:
        print(f"tiergate: the store cannot be read: {error}", file=sys.stderr)
        return CANNOT_LOOK
    verdict = compare(read)
    if args.json:
        sys.stdout.buffer.write(as_json(read, verdict) + b"\n")
    else:
        for line in lines(read, verdict):
            print(line)
    if verdict.differences:
        return DIFFERENCES
    return CANNOT_LOOK if read.unasked else CLEAN


def _settings(args: argparse.Namespace) -> Settings:
    """Raises UsageError."""
    overrides = {"store.url": args.store, "store.fleet": args.fleet}
    try:
        settings = load(args.config, os.environ, overrides)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if settings.store.kind is not StoreKind.REDIS:
        raise UsageError(
            f"the store is {settings.store.kind.value}, which only the gateways' own processes can see: give "
            "--store URL, or a configuration whose store.url names a Redis or Valkey"
        )
    return settings


async def _read(args: argparse.Namespace, settings: Settings) -> Readings:
    """Raises StoreUnavailable and UsageError."""
    store = settings.store
    try:
        address = parse_url(store.url.get_secret_value())
        address.check_files()
    except BadStoreUrl as error:
        raise UsageError(str(error)) from None
    token = settings.admin_token
    whom = Whom(
        tuple(args.gateway or ()),
        None if token is None else token.get_secret_value(),
        settings.backends,
        store.lease_s,
    )
    async with connect(address, ConnectOptions(client_name="tiergate-audit")) as connection:
        return await look(InventoryReader(connection, store.fleet), whom, Looks(args.readings, args.pause_s))
