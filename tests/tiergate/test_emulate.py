"""`tiergate emulate` as a user runs it: started, asked, stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request

import pytest

from tiergate.cli import main


def test_it_announces_serves_and_stops_cleanly(tiergate_command: list[str]) -> None:
    options = [
        "--port",
        "0",
        "--count",
        "2",
        "--model",
        "m",
        "--scheduling-policy",
        "priority",
        "--max-model-len",
        "999",
    ]
    with subprocess.Popen(
        [*tiergate_command, "emulate", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline() for _ in range(2)]
            urls = [found[0] for line in lines if (found := re.search(r"http://[\d.:]+\d", line))]
            assert len(set(urls)) == 2
            assert all("EMULATED" in line and "priority" in line for line in lines)
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for url in urls:
                with direct.open(f"{url}/v1/models", timeout=10) as answer:
                    (card,) = json.load(answer)["data"]
                assert (card["id"], card["max_model_len"], card["owned_by"]) == ("m", 999, "tiergate-emulated")
        finally:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=20)
    assert server.returncode == 0
    assert "Traceback" not in said
    assert "steps late by" in said
    assert "event loop late by" in said


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--profile", "h200"], 1, "did you mean"),
        (["--max-model-len", "100", "--kv-tokens", "50"], 2, "--kv-tokens"),
        (["--ports", "8001", "--count", "2"], 2, "leave --port and --count out"),
        (["--noise", "-1"], 2, "--noise"),
        (["--port", "65535", "--count", "2"], 2, "outside 0 to 65535"),
    ],
)
def test_wrong_options_say_what_is_wrong(
    options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["emulate", *options]) == code
    assert said in capsys.readouterr().err
