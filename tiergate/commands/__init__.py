"""The commands of `tiergate`, one module each: `add_parser(subparsers)` and `run(args) -> int`.

A command returns 0 when it did what was asked and 1 when it did not; it raises `CommandFailed` to say why.
Wrong arguments end with 2, as argparse does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TypeAlias

# argparse has no public name for what add_subparsers returns, and its class takes no parameter at run time
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@dataclass(frozen=True, slots=True)
class Command:
    """A command's name and its line in `tiergate --help`."""

    name: str
    summary: str


COMMANDS = (
    Command("serve", "run the gateway in front of one or more engines"),
    Command("check", "read a configuration, and explain what it means or what is wrong with it"),
    Command("bench", "offer open-loop load to an OpenAI base URL and score every token against its deadline"),
    Command("demo", "show mixed-tier load on a small fleet, compared with round robin and least load"),
    Command("state", "compare what gateways share with what they carry and what engines report"),
    Command("profile", "measure a live engine and write its latency profile"),
    Command("emulate", "run an emulated engine: vLLM's routes, times from a profile, no model"),
    Command("simulate", "run policies on a simulated fleet and compare them"),
    Command("replay", "run a recorded engine log through the engine model and print the error"),
)


class CommandFailed(Exception):
    """The command could not do what was asked; the message goes to the user, the exit code is 1."""


class UsageError(Exception):
    """The arguments do not go together; the message goes to the user, the exit code is 2."""
