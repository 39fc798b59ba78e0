"""How many connections each worker has, in memory that all of them see."""

from __future__ import annotations

import mmap
import os
import tempfile

_CELL_BYTES = 8


class Board:
    """One number a slot: open connections of the worker that has the slot, or nothing while it accepts none.

    Each slot has one writer, its worker (and the supervisor, once the worker is dead). A reader may see a number
    that is a moment old, which is all that a fair share needs.
    """

    def __init__(self, fd: int, slots: int) -> None:
        """`fd` is that of `create`, inherited. Raises OSError."""
        self.fd = fd
        self.slots = slots
        self._map = mmap.mmap(fd, slots * _CELL_BYTES)
        self._cells = memoryview(self._map).cast("q")  # one plus the number; 0 is nothing

    @classmethod
    def create(cls, slots: int) -> Board:
        """An empty board. Raises OSError."""
        with tempfile.TemporaryFile() as file:
            file.truncate(slots * _CELL_BYTES)
            return cls(os.dup(file.fileno()), slots)

    def write(self, slot: int, connections: int | None) -> None:
        self._cells[slot] = 0 if connections is None else connections + 1

    def read(self, slot: int) -> int | None:
        cell = self._cells[slot]
        return None if cell == 0 else cell - 1

    def fewest(self, beside: int) -> int | None:
        """The fewest connections of any accepting worker but `beside`; None when there is no other."""
        found = [cell for slot, cell in enumerate(self._cells) if cell and slot != beside]
        return min(found) - 1 if found else None

    def close(self) -> None:
        self._cells.release()
        self._map.close()
        os.close(self.fd)


class Share:
    """One worker's turns (`gateway.acceptor.Turns`): it goes first unless it has clearly more than the others."""

    def __init__(self, board: Board, slot: int) -> None:
        self._board = board
        self._slot = slot

    def mine(self, open_connections: int) -> bool:
        fewest = self._board.fewest(self._slot)
        # With many connections a few more are no unfairness, and giving way costs time.
        return fewest is None or open_connections <= fewest + fewest // 16

    def tell(self, open_connections: int | None) -> None:
        self._board.write(self._slot, open_connections)
