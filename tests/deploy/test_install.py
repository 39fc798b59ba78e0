"""Installing the engine's environment: only when its inputs changed, and failing with the remedy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deploy.vllm_cpu import install as installing


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What would be run; nothing is."""
    run: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        run.append(command)
        (tmp_path / "venv").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, f"{tmp_path} 1.2.3", "")

    monkeypatch.setattr("deploy.vllm_cpu.install.subprocess.run", record)
    return run


def test_it_installs_once_for_the_same_inputs(commands: list[list[str]], tmp_path: Path) -> None:
    python = installing.install(tmp_path / "venv")
    assert python == tmp_path / "venv" / "bin" / "python"
    local = [str(installing.HERE / "plugin"), str(installing.ENGINE_PACKAGE)]
    assert [command[-1] for command in commands if "pip" in command] == local
    assert "Name: vllm\nVersion: 1.2.3+cpu" in (tmp_path / "vllm-1.2.3+cpu.dist-info" / "METADATA").read_text()
    commands.clear()
    installing.install(tmp_path / "venv")
    assert not commands


def test_changed_inputs_install_again(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installing.install(tmp_path / "venv")
    commands.clear()
    monkeypatch.setattr(installing, "digest", lambda: "another")
    installing.install(tmp_path / "venv")
    assert commands


def test_the_digest_is_of_every_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = installing.digest()
    assert before == installing.digest()
    extra = tmp_path / "requirements.txt"
    extra.write_text("another==1\n")
    inputs = installing._inputs()
    monkeypatch.setattr(installing, "_inputs", lambda: [*inputs, extra])
    assert installing.digest() != before


def test_a_failure_says_where_torch_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr("deploy.vllm_cpu.install.subprocess.run", fail)
    with pytest.raises(installing.InstallFailed, match="find-links"):
        installing.install(tmp_path / "venv")
    assert not (tmp_path / "venv" / installing.STAMP).exists()
