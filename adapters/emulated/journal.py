"""What an emulated engine did with every sequence, line by line in a file, for tests that count afterwards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import orjson

_MODE = 0o644


class Fate(Enum):
    """What happened to a sequence."""

    SUBMITTED = "submitted"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line.

    Attributes:
        at_s: wall-clock time, so that journals of several processes can be put beside each other.
        sequence_id: `RESPONSE-PROMPT-CHOICE-SERIAL`, where RESPONSE ends with the request's `X-Request-Id`.
        tokens: that came out of it until then.
        open_sequences: the engine's own count, running and waiting, after this.
    """

    at_s: float
    fate: Fate
    sequence_id: str
    tokens: int
    open_sequences: int

    @property
    def request_id(self) -> str:
        """The request's `X-Request-Id`, as far as the client gave one."""
        response = self.sequence_id.rsplit("-", 3)[0]
        return response.partition("-")[2]


class Journal:
    """Appends entries. Each is handed to the operating system at once, so a process that is killed loses none."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        # O_NONBLOCK: should it be a pipe that nobody reads, the engine must not wait for it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        self._file = os.open(path, flags, _MODE)

    def note(self, fate: Fate, sequence_id: str, tokens: int, open_sequences: int) -> None:
        """Write one entry. Raises OSError."""
        line = orjson.dumps([round(time.time(), 6), fate.value, sequence_id, tokens, open_sequences])
        os.write(self._file, line + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> Iterator[Entry]:
    """Every whole line of a journal, oldest first. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                at_s, fate, sequence_id, tokens, open_sequences = orjson.loads(line)
                yield Entry(at_s, Fate(fate), sequence_id, tokens, open_sequences)
