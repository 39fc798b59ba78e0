"""The pure core compiled, for long campaigns: `python -m bench.compiled` builds it and prints where.

`tiergate_engine` and `scheduling` are strictly typed Python without any I/O, which mypyc turns into a C extension
as it is: the same decisions, at about half the cost. The build stands apart from the sources, under a name that
changes with them, so that an edit is never hidden by an old build. Without a C compiler all runs interpreted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "engine" / "tiergate_engine", ROOT / "scheduling")
PLAIN = frozenset({"__init__.py", "tiers.py", "scoring.py"})
"""Files that stay Python: a package's own, which only names what is in it, and values that go from one process to
another, of which one may run compiled and the other not."""
BINDINGS = ("vllm", "sglang")
"""Folders that stand on an engine's own code, which is not there when the core is compiled."""
_LONGEST_BUILD_S = 900
_SETUP = """
from setuptools import setup
from mypyc.build import mypycify

setup(name="tiergate-core", packages=[], ext_modules=mypycify({modules!r}, opt_level="3"))
"""


class NotBuilt(Exception):
    """The core could not be compiled here; the message says why."""


def folder() -> Path:
    """Where the build of these sources, by this interpreter and compiler, stands or would stand."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    digest.update(" ".join(sorted(PLAIN)).encode())
    digest.update(f"{importlib.metadata.version('mypy')} {sysconfig.get_config_var('EXT_SUFFIX')}".encode())
    return ROOT / "build" / "compiled" / digest.hexdigest()[:16]


def build() -> Path:
    """The folder to put in front of `sys.path`; built unless it is there. Raises NotBuilt."""
    target = folder()
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name) / "core"
        work.mkdir()
        for package in PACKAGES:
            shutil.copytree(package, work / package.name, ignore=shutil.ignore_patterns("__pycache__", *BINDINGS))
        modules = sorted(str(path.relative_to(work)) for path in work.rglob("*.py") if path.name not in PLAIN)
        (work / "setup.py").write_text(_SETUP.format(modules=modules))
        (work / "pyproject.toml").write_text("[tool.mypy]\nstrict = true\n")
        _compile(work)
        shutil.rmtree(work / "build", ignore_errors=True)
        if not target.is_dir():  # another process may have been first
            work.rename(target)
    return target


def _compile(work: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=_LONGEST_BUILD_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(str(error)) from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        wrong = [line for line in said if "error" in line.lower()] or said
        raise NotBuilt(wrong[0] if wrong else f"exit status {done.returncode}")


def _sources() -> list[Path]:
    found = (path for package in PACKAGES for path in package.rglob("*.py"))
    return sorted(path for path in found if path.parent.name not in BINDINGS)


def main() -> int:
    """Build and say where."""
    try:
        print(build())
    except NotBuilt as error:
        print(f"not compiled: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
