"""pip's settings in uv's words."""

from __future__ import annotations

import subprocess

import pytest

from deploy import uv_run


def _listing(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, text, "")

    monkeypatch.setattr("deploy.uv_run.subprocess.run", run)


def test_the_environment_wins_over_files_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _listing(
        monkeypatch, ":env:.find-links='b'\nglobal.find-links='a'\nglobal.index-url='i'\ninstall.index-url='j'\n"
    )
    assert uv_run.pip_settings() == {"find-links": "b", "index-url": "j"}


def test_several_values_stay_several(monkeypatch: pytest.MonkeyPatch) -> None:
    _listing(monkeypatch, "global.extra-index-url='one two'\nglobal.find-links='\\none\\ntwo'\n")
    environment = uv_run.uv_environment(uv_run.pip_settings())
    assert environment["UV_INDEX"] == "one two"
    assert environment["UV_FIND_LINKS"] == "one,two"


def test_no_settings_leave_uv_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _listing(monkeypatch, "")
    assert uv_run.uv_environment(uv_run.pip_settings()) == {"UV_INDEX_STRATEGY": "unsafe-best-match"}
