"""Results on disk: one JSON file per cell, named by its address.

The same cell gives the same bytes: what differs from run to run (`Timing`) lies in a file beside it. A file
appears whole or not at all. One that cannot be read, or that is not what its name says, counts as absent, and is
told.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter

from simulator.campaign.address import canonical
from simulator.outcome import CellOutcome, Timing
from simulator.scenario import Cell

FORMAT = 1
_TIMING_SUFFIX = ".timing.json"


class StoreWarning(UserWarning):
    """A stored result is not used; the message names the file and why."""


class UnstorableOutcome(ValueError):
    """An outcome that does not come back from its JSON as it was: a number in it is not finite."""


@dataclass(frozen=True, slots=True)
class _Body:
    cell: Cell
    outcome: CellOutcome


@dataclass(frozen=True, slots=True)
class _File:
    """What a file holds. `digest` is of the canonical JSON of `body`, so that a changed digit is noticed."""

    format: int
    address: str
    digest: str
    body: _Body


@dataclass(frozen=True, slots=True)
class Stored:
    """A result that was read back."""

    address: str
    cell: Cell
    outcome: CellOutcome


_FILE: TypeAdapter[_File] = TypeAdapter(_File)
_BODY: TypeAdapter[_Body] = TypeAdapter(_Body)
_TIMING: TypeAdapter[Timing] = TypeAdapter(Timing)


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of results. Safe for many processes that write: each writes whole files of its own."""

    folder: Path

    def prepare(self) -> None:
        """Make the folder, and see that it can be written before anything is run for it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.write(b"-")

    def path(self, address: str) -> Path:
        return self.folder / address[:2] / f"{address}.json"

    def put(self, address: str, cell: Cell, outcome: CellOutcome) -> None:
        """Store a result durably.

        Raises:
            UnstorableOutcome: it holds a number that is not finite.
            OSError: the folder cannot be written.
        """
        given = _Body(cell, replace(outcome, timing=None))
        try:
            body = _BODY.validate_json(_encode(given))
        except ValueError as error:
            raise UnstorableOutcome(f"{address}: {error}") from error
        if body != given:
            raise UnstorableOutcome(f"{address}: an outcome's numbers must be finite")
        encoded = _encode(body)
        file = _File(FORMAT, address, hashlib.sha256(encoded).hexdigest(), body)
        path = self.path(address)
        if outcome.timing is not None:
            _write(path.with_name(address + _TIMING_SUFFIX), orjson.dumps(outcome.timing))
        _write(path, _encode(file))

    def get(self, address: str, cell: Cell | None = None) -> CellOutcome | None:
        """A stored result with its timing; None, with a warning when there is a file, if it cannot be used.

        With `cell`, a file that holds another cell is not used.
        """
        stored = self._read(self.path(address), address)
        if stored is None:
            return None
        if cell is not None and _placeless(stored.cell) != _placeless(cell):
            _warn(self.path(address), "it holds another cell")
            return None
        return replace(stored.outcome, timing=self._timing(address))

    def stored(self) -> Iterator[Stored]:
        """Every usable result, by address. Unusable files are passed over with a warning."""
        for path in sorted(self.folder.glob("??/*.json")):
            if path.name.startswith(".") or path.name.endswith(_TIMING_SUFFIX):
                continue
            stored = self._read(path, path.stem)
            if stored is not None:
                yield replace(stored, outcome=replace(stored.outcome, timing=self._timing(stored.address)))

    def remove_unfinished(self, pid: int) -> None:
        """Remove what a process that ended while it wrote has left."""
        for path in self.folder.glob(f"??/.*.{pid}.tmp"):
            path.unlink(missing_ok=True)

    def _read(self, path: Path, address: str) -> Stored | None:
        try:
            file = _checked(path.read_bytes(), address)
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn(path, error.strerror or str(error))
            return None
        except ValueError as error:
            _warn(path, str(error))
            return None
        return Stored(address, file.body.cell, file.body.outcome)

    def _timing(self, address: str) -> Timing | None:
        path = self.path(address).with_name(address + _TIMING_SUFFIX)
        try:
            return _TIMING.validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None  # it is beside the point of a result


def _checked(data: bytes, address: str) -> _File:
    """What a file holds. Raises ValueError, whose message says why it cannot be used."""
    try:
        file, plain = _FILE.validate_json(data), orjson.loads(data)
    except ValueError:  # pydantic's and orjson's errors are both
        raise ValueError("it is damaged, or no result of this version") from None
    if file.format != FORMAT:
        raise ValueError(f"its format is {file.format}, not {FORMAT}")
    if file.address != address:
        raise ValueError(f"it is the result of {file.address}")
    # What stands there is judged, not what was made of it: a field that came later has its default there.
    if hashlib.sha256(_encode(plain["body"])).hexdigest() != file.digest:
        raise ValueError("its content is not what was stored")
    return file


def _encode(value: object) -> bytes:
    """JSON with sorted keys; those of dataclasses are sorted as plain ones only."""
    return orjson.dumps(orjson.loads(orjson.dumps(value)), option=orjson.OPT_SORT_KEYS)


def _placeless(cell: Cell) -> bytes:
    """The cell but for where its files lie, which the address leaves out too."""
    engines = tuple(replace(kind, profile="") for kind in cell.fleet.engines)
    return canonical(
        replace(cell, workload=replace(cell.workload, trace=""), fleet=replace(cell.fleet, engines=engines))
    )


def _warn(path: Path, why: str) -> None:
    warnings.warn(f"{path} is not used and its cell will run again: {why}", StoreWarning, stacklevel=4)


def _write(path: Path, data: bytes) -> None:
    """Write a whole file: to a name of its own, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
