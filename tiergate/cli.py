"""The command line: finds the command's module, imports only that one, and turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import ModuleType

from tiergate.commands import COMMANDS, CommandFailed, UsageError

DONE = 0
FAILED = 1
USAGE = 2
INTERRUPTED = 130


def _load(name: str) -> ModuleType:
    module = f"tiergate.commands.{name}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise CommandFailed(f"this build of tiergate has no `{name}` command") from error
        raise CommandFailed(f"`{name}` needs the Python package {error.name!r}, which is not installed") from error


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with all commands listed; only `command`'s own arguments are known, so only it is imported."""
    parser = argparse.ArgumentParser(
        prog="tiergate",
        description="SLO-aware OpenAI-compatible gateway for fleets of LLM engines.",
        epilog="`tiergate COMMAND --help` tells a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"tiergate {version('tiergate')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for known in COMMANDS:
        if known.name == command:
            _load(known.name).add_parser(subparsers)
        else:
            subparsers.add_parser(known.name, help=known.summary)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a whole command line. Raises SystemExit as argparse does, CommandFailed for a missing command."""
    return build_parser(argv[0] if argv else None).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        run: Callable[[argparse.Namespace], int] = args.func
        return run(args)
    except CommandFailed as error:
        print(f"tiergate: {error}", file=sys.stderr)
        return FAILED
    except UsageError as error:
        print(f"tiergate: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
