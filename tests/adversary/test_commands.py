"""Commands with wrong arguments: a sentence that says what is wrong, never a traceback."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest

from profiles.measure import Sweep
from tests.adversary.stand import tiergate
from tiergate.cli import main

BENCH = ["bench", "--url", "http://127.0.0.1:1/v1", "--model", "m", "--quiet", "--duration", "1", "--warmup", "0"]
POISSON = [*BENCH, "--poisson", "2", "--tiers", "a=1:1000/50"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*POISSON, "--rate-factor", "2"], "--rate-factor and --from are for --trace"),
        ([*POISSON, "--unstreamed", "2"], "--unstreamed must be"),
        ([*POISSON, "--drain", "-1"], "--drain must be"),
        ([*POISSON, "--max-tokens", "0"], "--max-tokens must be"),
        (
            [*BENCH, "--trace", "azure2023_conv", "--tiers", "a=1:9/9", "--rate-factor", "nan"],
            "--rate-factor must",
        ),
        ([*BENCH, "--poisson", "1", "--tiers", "{folder}/bytes"], "not valid YAML"),
        ([*BENCH, "--poisson", "1", "--tiers", "{folder}/broken"], "not valid YAML"),
        (["emulate", "--noise", "nan", "--port", "0"], "--noise must be"),
        (["emulate", "--keep-alive-s", "-1", "--port", "0"], "--keep-alive-s must be"),
        (["emulate", "--grace-s", "inf", "--port", "0"], "--grace-s must be"),
        (["emulate", "--max-num-queued-reqs", "-1", "--port", "0"], "--max-num-queued-reqs must be"),
        (["emulate", "--ports", "1,a"], "port numbers"),
        (["serve", "--config", "{folder}/bytes"], "bytes"),
        (["check", "--config", "{folder}/bytes"], "bytes"),
        (["check", "--backend", "http://h:99999"], "99999"),
    ],
)
def test_wrong_arguments_end_with_2_and_say_why(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0")
    (tmp_path / "broken").write_text("a: [")
    assert _main(*(one.format(folder=tmp_path) for one in arguments)) == 2
    assert told in capsys.readouterr().err


def test_a_result_that_cannot_be_written_is_told_before_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tmp_path, tmp_path / "nowhere" / "result.json"):
        assert _main(*POISSON, "--json", str(target)) == 1
        assert capsys.readouterr().err.startswith("tiergate: --json:")


def test_a_measurement_has_an_end() -> None:
    for seconds in (math.nan, math.inf, 0.0):
        with pytest.raises(ValueError, match="max_seconds"):
            Sweep(max_seconds=seconds)


def _main(*arguments: str) -> int:
    """The command line in this process: these arguments are refused before anything starts."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


@pytest.mark.parametrize("arguments", [["serve", "--backend", "http://127.0.0.1:1"], ["emulate"]])
def test_a_port_in_use_is_said_in_a_sentence(arguments: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = tiergate(*arguments, "--port", str(port))
    assert code == 1
    assert "Traceback" not in said
    assert f"cannot listen on 127.0.0.1:{port}" in said
