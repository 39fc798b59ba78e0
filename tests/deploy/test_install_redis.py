"""Installing redis-server: only where it is missing, without a service left running, failing with the remedy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deploy.redis import install as installing


class Machine:
    """A machine whose programs are pretended: what would be run is noted, and `apt-get install` installs."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.programs: set[str] = set()
        self.commands: list[str] = []
        self.version = "Redis server v=7.0.15 sha=00000000:0"
        self.failing = ""
        self._folder = folder
        patch.setattr("deploy.redis.install.subprocess.run", self._run)
        patch.setattr("deploy.redis.install.shutil.which", lambda name: name if name in self.programs else None)
        patch.setattr(installing, "SYSTEMD", folder / "systemd")
        patch.setattr(installing, "INIT_SCRIPT", folder / "init")

    def runs_systemd(self) -> None:
        (self._folder / "systemd").mkdir()

    def has_init_scripts(self) -> None:
        (self._folder / "init").touch()

    def _run(self, command: list[str], *, check: bool, **_: object) -> subprocess.CompletedProcess[str]:
        line = " ".join(command)
        self.commands.append(line)
        if check and self.failing and self.failing in line:
            raise subprocess.CalledProcessError(100, command)
        if "install" in command:
            self.programs.add("redis-server")
        return subprocess.CompletedProcess(command, 0, self.version, "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return Machine(monkeypatch, tmp_path)


def test_what_is_there_is_taken_as_it_is(machine: Machine) -> None:
    machine.programs = {"redis-server"}
    assert installing.install() == "redis-server"
    assert machine.commands == ["redis-server --version"]


def test_a_missing_one_is_installed(machine: Machine) -> None:
    machine.programs = {"apt-get"}
    assert installing.install() == "redis-server"
    assert "update" in machine.commands[0]
    assert machine.commands[1].endswith("install --yes --no-install-recommends redis-server")
    assert not any("sudo" in command for command in machine.commands)


def test_no_service_is_left_running_under_systemd(machine: Machine) -> None:
    machine.programs = {"apt-get"}
    machine.runs_systemd()
    installing.install()
    assert "systemctl disable --quiet --now redis-server" in machine.commands


def test_no_service_is_left_running_under_init_scripts(machine: Machine, tmp_path: Path) -> None:
    machine.programs = {"apt-get"}
    machine.has_init_scripts()
    installing.install()
    assert f"{tmp_path / 'init'} stop" in machine.commands
    assert "update-rc.d redis-server disable" in machine.commands


def test_who_is_not_root_asks_sudo(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.programs = {"apt-get", "sudo"}
    installing.install()
    assert machine.commands[1].startswith("sudo env DEBIAN_FRONTEND=noninteractive apt-get")


def test_every_failure_names_the_remedy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(installing.InstallFailed, match="no apt-get here: install Redis 7"):
        installing.install()
    machine.programs = {"apt-get"}
    machine.failing = "install --yes"
    with pytest.raises(installing.InstallFailed, match="ended with 100; install Redis 7"):
        installing.install()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(installing.InstallFailed, match="no sudo: as root run"):
        installing.install()
    machine.programs = {"redis-server"}
    machine.version = "Redis server v=6.0.16 sha=00000000:0"
    with pytest.raises(installing.InstallFailed, match=r"too old .*v=6\.0\.16"):
        installing.install()
