"""Install vLLM for CPU into an environment of its own, with Tiergate's engine package in it.

`python deploy/vllm_cpu/install.py [--venv .venv-vllm]` runs under the project's interpreter, which has uv. It does
nothing when the environment was made from the same inputs. torch's CPU build is found through pip's own settings
(find-links or an extra index): vLLM's CPU build pins a version that no other torch satisfies.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON_VERSION = "3.11"  # the CPU builds of torch that vLLM pins exist for this one
STAMP = "tiergate-inputs.sha256"
ENGINE_PACKAGE = ROOT / "engine"
ENGINE_STAMP = "tiergate-engine.sha256"


class InstallFailed(Exception):
    """The engine's environment could not be made."""


def _inputs() -> list[Path]:
    plugin = sorted(path for path in (HERE / "plugin").rglob("*") if path.suffix in {".py", ".toml"})
    return [HERE / "requirements.txt", HERE / "overrides.txt", HERE / "constraints.txt", Path(__file__), *plugin]


def digest() -> str:
    """What the environment is made from, as one number."""
    total = hashlib.sha256()
    for path in _inputs():
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as failed:
        raise InstallFailed(
            f"{' '.join(command[:6])} ... ended with {failed.returncode}. When torch's CPU build was not found, "
            "tell pip where it is: `pip config set global.find-links ...` or `global.extra-index-url ...`."
        ) from failed


def _name_the_distribution(python: Path) -> None:
    """vLLM's command line looks for a distribution called vllm, but the CPU build is called vllm-cpu."""
    lookup = (
        "import sysconfig, importlib.metadata as m; print(sysconfig.get_path('purelib'), m.version('vllm-cpu'))"
    )
    answer = subprocess.run([str(python), "-c", lookup], check=True, capture_output=True, text=True).stdout
    site, version = answer.split()
    folder = Path(site) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "INSTALLER").write_text("tiergate\n")
    (folder / "RECORD").write_text("")


def _add_engine_package(venv: Path) -> None:
    """The plug-in that drives vLLM, as it stands in this checkout: an edit needs no installation."""
    manifest = ENGINE_PACKAGE / "pyproject.toml"
    wanted = hashlib.sha256(f"{ENGINE_PACKAGE}\n".encode() + manifest.read_bytes()).hexdigest()
    stamp = venv / ENGINE_STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return
    _uv_pip(venv / "bin" / "python", ["--no-deps", "--reinstall", "--editable", str(ENGINE_PACKAGE)])
    stamp.write_text(wanted)


def _uv_pip(python: Path, arguments: list[str]) -> None:
    _run(
        [sys.executable, str(ROOT / "deploy" / "uv_run.py"), "pip", "install", "--python", str(python), *arguments]
    )


def install(venv: Path) -> Path:
    """Make the environment if it is not there as wanted; returns its interpreter. Raises InstallFailed."""
    if importlib.util.find_spec("uv") is None:
        raise InstallFailed("run this with the project's interpreter (`make .venv`), which has uv")
    venv = venv.resolve()
    python = venv / "bin" / "python"
    lock_path = ROOT / ".engine" / "install.lock"
    lock_path.parent.mkdir(exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a test run and a demonstration may both want it
        wanted = digest()
        stamp = venv / STAMP
        if stamp.exists() and stamp.read_text() == wanted:
            _add_engine_package(venv)
            return python
        _run([sys.executable, "-m", "uv", "venv", "--clear", "--python", PYTHON_VERSION, str(venv)])
        arguments = ["--overrides", str(HERE / "overrides.txt"), "--constraints", str(HERE / "constraints.txt")]
        arguments += ["--requirements", str(HERE / "requirements.txt"), str(HERE / "plugin")]
        _uv_pip(python, arguments)
        _name_the_distribution(python)
        stamp.write_text(wanted)
        _add_engine_package(venv)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description="Install vLLM for CPU into an environment of its own.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm")
    try:
        print(f"engine environment ready: {install(parser.parse_args().venv)}")
    except InstallFailed as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
