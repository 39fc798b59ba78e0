"""The shape of the house: imports go one way, the core is pure, modules stay small, the package is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each package may import of ours, beside itself (design.md, "Imports go one way").
ALLOWED: dict[str, frozenset[str]] = {
    "tiergate_engine": frozenset(),
    "scheduling": frozenset({"tiergate_engine"}),
    "profiles": frozenset({"tiergate_engine"}),
    "state": frozenset({"tiergate_engine", "scheduling", "profiles"}),
    "adapters": frozenset({"tiergate_engine", "scheduling", "profiles"}),
    "gateway": frozenset({"tiergate_engine", "scheduling", "profiles", "state", "adapters"}),
    "workloads": frozenset({"tiergate_engine", "scheduling"}),
    "simulator": frozenset({"tiergate_engine", "scheduling", "profiles", "state", "adapters", "workloads"}),
    "loadgen": frozenset({"tiergate_engine", "scheduling", "profiles", "state", "adapters", "workloads"}),
    "tiergate": frozenset(
        {
            "tiergate_engine",
            "scheduling",
            "profiles",
            "state",
            "adapters",
            "gateway",
            "workloads",
            "simulator",
            "loadgen",
        }
    ),
}
PURE = ("tiergate_engine", "scheduling")
ARRAYS = "numpy"  # the core may reckon with arrays
# An engine binding may import its engine, and nothing of ours may import a binding.
BINDINGS = ("tiergate_engine.vllm", "tiergate_engine.sglang")
# Runs from a source checkout only, and says so when `deploy` is not there: the wheel does not hold it.
CHECKOUT_ONLY = frozenset({"tiergate.demo.real"})
IMPURE_MODULES = frozenset(
    {
        "asyncio", "concurrent", "datetime", "http", "importlib", "io", "logging", "multiprocessing", "os",
        "pathlib", "secrets", "select", "selectors", "shutil", "signal", "socket", "subprocess", "sys",
        "tempfile", "threading", "time", "urllib", "uuid", "warnings",
    }
)  # fmt: skip
IMPURE_CALLS = frozenset({"open", "print", "input", "exec", "eval"})
MOST_LINES = 500


@dataclass(frozen=True, slots=True)
class Module:
    """One source file of a package, parsed."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def is_binding(self) -> bool:
        return any(self.name == binding or self.name.startswith(binding + ".") for binding in BINDINGS)


def _folder(package: str) -> Path:
    return ROOT / "engine" / package if package == "tiergate_engine" else ROOT / package


def _modules(package: str) -> list[Module]:
    folder = _folder(package)
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = list(path.relative_to(folder.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Module(".".join(parts), path, ast.parse(path.read_text(), filename=str(path))))
    return found


MODULES = [module for package in ALLOWED for module in _modules(package)]
CORE = [module for module in MODULES if module.package in PURE and not module.is_binding]


def imports(module: Module) -> Iterator[str]:
    """The absolute names a module imports, wherever the statement stands."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1])
                yield f"{base}.{node.module}" if node.module else base


def _violations(module: Module) -> list[str]:
    allowed = ALLOWED[module.package] | {module.package}
    wrong = [name for name in imports(module) if (top := name.partition(".")[0]) in ALLOWED and top not in allowed]
    unpackaged = {"tests", "bench"} if module.name in CHECKOUT_ONLY else {"tests", "bench", "deploy"}
    wrong += [name for name in imports(module) if name.split(".")[0] in unpackaged]
    if not module.is_binding:
        wrong += [name for name in imports(module) if any((name + ".").startswith(b + ".") for b in BINDINGS)]
    return wrong


def _ids(modules: list[Module]) -> list[str]:
    return [module.name for module in modules]


def test_every_package_of_the_wheel_is_known_here() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packaged = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(name).name for name in packaged} == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES, ids=_ids(MODULES))
def test_imports_go_one_way(module: Module) -> None:
    assert not _violations(module), f"{module.name} may not import {_violations(module)}"


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("gateway.relay", "from simulator import clock", ["simulator", "simulator.clock"]),
        ("scheduling.predict", "import profiles.table", ["profiles.table"]),
        ("profiles.table", "def f():\n    import scheduling.tiers", ["scheduling.tiers"]),
        ("state.memory", "from scheduling.load import LoadVector", []),
        ("tiergate.cli", "import gateway.app, loadgen, simulator", []),
        ("loadgen.run", "import tests.conftest", ["tests.conftest"]),
        ("tiergate_engine.step", "from tiergate_engine import vllm", ["tiergate_engine.vllm"]),
    ],
)  # fmt: skip
def test_the_rule_finds_wrong_imports(name: str, source: str, wrong: list[str]) -> None:
    module = Module(name, ROOT / (name.replace(".", "/") + ".py"), ast.parse(source))
    assert _violations(module) == wrong


@pytest.mark.parametrize("module", CORE, ids=_ids(CORE))
def test_the_core_needs_the_standard_library_and_arrays_only(module: Module) -> None:
    tops = {name.partition(".")[0] for name in imports(module)}
    assert tops <= sys.stdlib_module_names | set(PURE) | {ARRAYS}


def test_the_core_draws_no_chance_from_arrays() -> None:
    names = {name for module in CORE for name in imports(module)}
    assert not {name for name in names if name.startswith(f"{ARRAYS}.random")}
    assert not [module.name for module in CORE if re.search(r"\bnp\.random\b", module.path.read_text())]


@pytest.mark.parametrize("module", CORE, ids=_ids(CORE))
def test_the_core_has_no_clock_chance_files_or_logs(module: Module) -> None:
    tops = {name.partition(".")[0] for name in imports(module)}
    assert not tops & IMPURE_MODULES
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in IMPURE_CALLS, f"{module.name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            # the generator's type may be named; drawing from the module's own generator may not
            assert node.attr == "Random", f"{module.name}:{node.lineno} uses the global random.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} <= {"Random"}


@pytest.mark.parametrize("module", MODULES, ids=_ids(MODULES))
def test_modules_are_small_and_say_what_they_are(module: Module) -> None:
    lines = module.path.read_text().count("\n")
    assert lines <= MOST_LINES, f"{module.path.relative_to(ROOT)} has {lines} lines"
    assert not lines or ast.get_docstring(module.tree), f"{module.path.relative_to(ROOT)} has no docstring"


def _binds_state(node: ast.stmt) -> bool:
    """Whether a statement makes something to be filled later. A filled table in capitals is a constant."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    if names == ["__all__"]:
        return False
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and not value.args:
        return value.func.id in {"list", "dict", "set", "defaultdict", "deque", "Counter"}
    if isinstance(value, ast.Dict):
        return not value.keys or not all(name.isupper() for name in names)
    if isinstance(value, ast.List | ast.Set):
        return not value.elts or not all(name.isupper() for name in names)
    return False


@pytest.mark.parametrize("module", MODULES, ids=_ids(MODULES))
def test_no_module_holds_mutable_state(module: Module) -> None:
    for statement in module.tree.body:
        assert not _binds_state(statement), f"{module.name}:{statement.lineno} is state of the module"
    for node in ast.walk(module.tree):
        assert not isinstance(node, ast.Global), f"{module.name}:{node.lineno} rebinds a module's name"


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("_cache = {}", True),
        ("SEEN: set[str] = set()", True),
        ("kinds = {'a': 1}", True),
        ("KINDS = {'a': 1}", False),
    ],
)
def test_the_rule_finds_state(source: str, state: bool) -> None:
    assert _binds_state(ast.parse(source).body[0]) is state


@pytest.mark.parametrize("name", ["constraints.txt", "deploy/vllm_cpu/constraints.txt"])
def test_constraints_are_exact_and_name_no_registry(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), f"{name}: {line}"


def test_every_dependency_is_pinned() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [need for needs in settings["project"]["optional-dependencies"].values() for need in needs]
    wanted = [*settings["project"]["dependencies"], *extras, *settings["dependency-groups"]["dev"]]
    names = {re.split(r"[<>=!~;\[ ]", need)[0].lower().replace("_", "-") for need in wanted}
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned, f"run `make constraints`: {sorted(names - pinned)} are not pinned"


def _tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name]


def test_documents_link_to_files_that_exist() -> None:
    broken = []
    for page in [path for path in _tracked() if path.suffix == ".md" and path.exists()]:
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        here = [target for target in targets if not re.match(r"[a-z]+:", target)]
        broken += [f"{page.relative_to(ROOT)} -> {to}" for to in here if not (page.parent / to).exists()]
    assert not broken


def test_documents_name_tests_that_exist() -> None:
    missing = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        named = re.findall(r"`(tests/[\w/]+\.py)`", page.read_text())
        missing += [f"{page.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_its_data(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "deploy" / "uv_run.py"),
            "build",
            "--quiet",
            "--wheel",
            "--out-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        check=True,
    )
    (wheel,) = tmp_path.glob("tiergate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == set(ALLOWED)
    for package in ALLOWED:
        folder = _folder(package)
        for path in _tracked():
            if path.is_relative_to(folder) and path.exists():
                assert path.relative_to(folder.parent).as_posix() in names
        assert f"{package}/py.typed" in names


@pytest.mark.slow
def test_the_engine_package_is_built_alone_without_dependencies(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "deploy" / "uv_run.py"),
        "build",
        "--quiet",
        "--wheel",
        "--out-dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT / "engine", check=True)
    (wheel,) = tmp_path.glob("tiergate_engine-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"tiergate_engine"}
    assert "Requires-Dist" not in metadata
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"Version: {settings['project']['version']}\n" in metadata
