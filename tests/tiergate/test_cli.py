"""The command line: what it lists, what it imports, and its exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from tiergate import cli
from tiergate.commands import COMMANDS, CommandFailed, Subparsers, UsageError

ROOT = Path(__file__).resolve().parent.parent.parent


def _install(monkeypatch: pytest.MonkeyPatch, name: str, outcome: int | Exception | KeyboardInterrupt) -> None:
    """Put a command in place of a real one: it returns or raises `outcome`."""

    def run(_: argparse.Namespace) -> int:
        if isinstance(outcome, int):
            return outcome
        raise outcome

    def add_parser(subparsers: Subparsers) -> None:
        subparsers.add_parser(name).set_defaults(func=run)

    module = ModuleType(f"tiergate.commands.{name}")
    module.__dict__.update(add_parser=add_parser, run=run)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def _tiergate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tiergate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def test_the_version_is_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    answer = _tiergate("--version")
    assert (answer.returncode, answer.stdout) == (0, f"tiergate {version}\n")


def test_the_version_imports_no_command() -> None:
    code = (
        "import sys; from tiergate.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*sorted(tops & {'aiohttp', 'numpy', 'pydantic', 'gateway', 'scheduling'}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == ""


def test_help_lists_every_command() -> None:
    answer = _tiergate("--help")
    assert answer.returncode == 0
    for command in COMMANDS:
        assert command.name in answer.stdout


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    answer = _tiergate(*arguments)
    assert answer.returncode == 2
    assert "usage: tiergate" in answer.stderr


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: tiergate {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (CommandFailed("no engine at http://x"), 1, "tiergate: no engine at http://x\n"),
        (UsageError("--a and --b exclude each other"), 2, "tiergate: --a and --b exclude each other\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outcome: int | Exception | KeyboardInterrupt,
    code: int,
    message: str,
) -> None:
    _install(monkeypatch, "check", outcome)
    assert cli.main(["check"]) == code
    assert capsys.readouterr().err == message


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "check", ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["check"])


def test_a_missing_dependency_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named 'matplotlib' (for {name})", name="matplotlib")

    monkeypatch.setattr("tiergate.cli.importlib.import_module", fail)
    assert cli.main(["bench"]) == 1
    assert "matplotlib" in capsys.readouterr().err
