"""What a worker process is told when it is started.

It travels in the environment, so that no password that stands in it is seen in a list of processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

# No TIERGATE_ in front: those are settings.
VARIABLE = "_TIERGATE_WORKER"

Argument = str | int | bool | list[str] | None


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker.

    Attributes:
        arguments: the command line of `tiergate serve`, as it was parsed.
        adopt_file: it puts its file into the store, whatever the store has.
        number: which of the workers it is; its replacement has the same.
        slot: its place on the board; its replacement has another.
        slots: how many the board has.
        control, board, listeners: inherited file descriptors.
    """

    arguments: Mapping[str, Argument]
    adopt_file: bool
    number: int
    slot: int
    slots: int
    control: int
    board: int
    listeners: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        """What to add to the worker's environment."""
        return {VARIABLE: orjson.dumps(asdict(self)).decode()}

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> WorkerSpec:
        """What `environment` says, which is taken out of it. Raises KeyError in a process that is no worker."""
        told = orjson.loads(environment.pop(VARIABLE))
        return cls(**{**told, "listeners": tuple(told["listeners"])})

    def namespace(self) -> argparse.Namespace:
        """The command line as commands take it."""
        made = argparse.Namespace(**self.arguments)
        made.config = None if made.config is None else Path(made.config)
        return made


def arguments_of(args: argparse.Namespace, store_url: str) -> dict[str, Argument]:
    """A parsed command line in a form that travels, with the store that all workers share."""
    known = {name: value for name, value in vars(args).items() if name not in {"func", "command"}}
    known = {name: str(value) if isinstance(value, Path) else value for name, value in known.items()}
    return {**known, "store": store_url}
