"""A cell's address: what its result depends on, as a hash.

Two runs have one address when the cell, the code that runs it and the bytes of its trace and profiles are the
same, on whatever machine and under whatever path. The code is what `simulator.cell` reaches by its imports, so
that a change to a report or to the gateway lets stored results stand.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import orjson
from pydantic import TypeAdapter

from profiles.catalogue import shipped
from simulator.scenario import Cell, Engines

ENTRY = "simulator.cell"
"""The module that runs a cell."""

OURS = frozenset({"tiergate_engine", "scheduling", "profiles", "state", "adapters", "workloads", "simulator"})
_UNIFORM = "uniform:"
_HEX = 32  # 128 bits
_CELL: TypeAdapter[Cell] = TypeAdapter(Cell)


class AddressError(ValueError):
    """A cell names a trace or a profile that is not there, or the code cannot be found. The message names it."""


def canonical(cell: Cell) -> bytes:
    """The cell as JSON: sorted keys, whole numbers of seconds written as the fractions they are."""
    exact = orjson.dumps(_CELL.validate_json(orjson.dumps(cell)))
    return orjson.dumps(orjson.loads(exact), option=orjson.OPT_SORT_KEYS)


def parse(data: bytes) -> Cell:
    """The cell that `canonical` wrote. Raises pydantic.ValidationError, a ValueError, for anything else."""
    return _CELL.validate_json(data)


def sources(entry: str = ENTRY) -> dict[str, Path]:
    """Our modules that `entry` reaches by imports, wherever the statements stand, with their files.

    A package's `__init__` counts with every module in it. Raises AddressError when `entry` is not there.
    """
    found: dict[str, Path] = {}
    waiting = [entry]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] not in OURS:
            continue
        path = _file_of(name)
        if path is None:
            continue  # a name inside a module, not a module
        found[name] = path
        waiting.extend(_imported(name, path))
        waiting.append(name.rpartition(".")[0])
    if entry not in found:
        raise AddressError(f"{entry} is not among the installed packages")
    return dict(sorted(found.items()))


def code_digest(entry: str = ENTRY) -> str:
    """A hash of the sources that run a cell, by module name and content."""
    digest = hashlib.sha256()
    for name, path in sources(entry).items():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _file_of(name: str) -> Path | None:
    """A module's file, found without running it."""
    top, *rest = name.split(".") if name else [""]
    spec = importlib.util.find_spec(top) if top else None
    if spec is None or not spec.submodule_search_locations:
        return None
    for location in spec.submodule_search_locations:
        place = Path(location, *rest)
        for path in (place / "__init__.py", place.with_suffix(".py") if rest else place / "__init__.py"):
            if path.is_file():
                return path
    return None


def _imported(name: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@dataclass(slots=True)
class Addresser:
    """Addresses of many cells: the code is read once, and every trace and profile once.

    Attributes:
        code: a digest of the code; `code_digest()` unless a test says otherwise.
    """

    code: str
    _files: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def of_this_code(cls) -> Addresser:
        return cls(code_digest())

    def address(self, cell: Cell) -> str:
        """The cell's address, in hex. Raises AddressError."""
        trace = self._trace(cell.workload.trace)
        profiles = tuple(self._profile(kind.profile) for kind in cell.fleet.engines)
        # A file's path says nothing about what is in it; its content takes its place.
        engines: tuple[Engines, ...] = tuple(
            replace(kind, profile=content) for kind, content in zip(cell.fleet.engines, profiles, strict=True)
        )
        placeless = replace(
            cell,
            workload=replace(cell.workload, trace=trace),
            fleet=replace(cell.fleet, engines=engines),
        )
        return hashlib.sha256(self.code.encode() + b"\n" + canonical(placeless)).hexdigest()[:_HEX]

    def _trace(self, name: str) -> str:
        if name.startswith(_UNIFORM):
            return name
        key = ("trace", name)
        if key not in self._files:
            packaged = _packaged("workloads", "data", f"{name}.csv.gz")
            self._files[key] = _digest(packaged or Path(name), f"trace {name!r}")
        return self._files[key]

    def _profile(self, name: str) -> str:
        key = ("profile", name)
        if key not in self._files:
            packaged = _packaged("profiles", "shipped", f"{name}.json") if name in shipped() else None
            self._files[key] = _digest(packaged or Path(name), f"profile {name!r}")
        return self._files[key]


def _packaged(package: str, folder: str, file: str) -> Path | None:
    if "/" in file:
        return None
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations if spec else None) or ():
        path = Path(location, folder, file)
        if path.is_file():
            return path
    return None


def _digest(path: Path, what: str) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise AddressError(f"{what} cannot be read: {error.strerror or error}") from error
