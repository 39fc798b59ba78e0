"""`tiergate profile`: lists, shows, and measures an emulated engine over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import profiles
from tiergate import cli

if TYPE_CHECKING:
    from tests.conftest import StartServer


def test_list_names_every_shipped_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "list"]) == 0
    printed = capsys.readouterr().out
    for name in profiles.shipped():
        assert name in printed


def test_show_tells_where_the_numbers_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "show", "rtxpro6000-qwen3-32b-bf16"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Qwen/Qwen3-32B", "LLMServingSim", "MIT", "composed", "80000", "ms"):
        assert expected in printed


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "no-such-profile"], cli.FAILED, "no profile is named 'no-such-profile'"),
        (["show"], cli.USAGE, "needs the name"),
        ([], cli.USAGE, "--url and --out"),
        (["--url", "http://127.0.0.1:9"], cli.USAGE, "--url and --out"),
        (["--url", "http://127.0.0.1:9", "--out", "/no/such/folder/x.json"], cli.USAGE, "no folder"),
        (["--url", "http://127.0.0.1:9", "--out", "Bad Name.json"], cli.USAGE, "--profile-name"),
        (["--url", "nonsense", "--out", "x.json"], cli.USAGE, "--url"),
        (["--url", "http://127.0.0.1:9", "--out", "x.json"], cli.FAILED, "127.0.0.1:9"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: Sequence[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_emulated_engine_is_measured_over_http(
    start_server: StartServer,
    tiergate_command: list[str],
    free_port: Callable[[], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    port = free_port()
    truth = "h100-llama-3.1-8b-bf16"
    start_server(
        [*tiergate_command, "emulate", "--profile", truth, "--port", str(port)], port, ready_path="/health"
    )
    out = tmp_path / "measured.json"
    arguments = ["--url", f"http://127.0.0.1:{port}", "--out", str(out), "--max-seconds", "8"]
    assert cli.main(["profile", *arguments, "--max-seqs", "4", "--max-model-len", "2200"]) == 0
    assert "written to" in capsys.readouterr().out
    found = profiles.load(out)
    assert "EMULATED" in found.file.provenance.conditions
    assert found.model == profiles.load(truth).model
    assert found.limits.kv_tokens == 430_000
    # A busy machine makes an engine look slower, never faster: only the lower side can be asserted.
    known, measured = profiles.load(truth).step_time, found.step_time
    assert measured.decode_seconds(2, 600) > 0.5 * known.decode_seconds(2, 600)
    prompt = (1500, 1, 0, 1500 * 750.0, 0, 0)
    assert measured.seconds_of(*prompt) > 0.5 * known.seconds_of(*prompt)
