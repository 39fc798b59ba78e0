"""`tiergate bench` from its command line to its files, against an emulated engine."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from loadgen.prompts import WordPrompts
from loadgen.search import Goodput, Point
from loadgen.target import Lengths, Target
from scheduling.tiers import Slo
from tests.conftest import StartServer
from tiergate import cli
from tiergate.commands.bench import describe, read_mix
from workloads.mix import TierShare, WorkloadError
from workloads.plan import PlannedRequest

MODEL = "emulated"


@pytest.fixture
def engine_url(start_server: StartServer, free_port: Callable[[], int], tiergate_command: list[str]) -> str:
    port = free_port()
    start_server([*tiergate_command, "emulate", "--port", str(port), "--model", MODEL], port, ready_path="/health")
    return f"http://127.0.0.1:{port}/v1"


def bench(command: list[str], url: str, *options: str) -> subprocess.CompletedProcess[str]:
    base = [*command, "bench", "--url", url, "--model", MODEL, "--lengths", "emulated", "--quiet"]
    return subprocess.run([*base, *options], capture_output=True, text=True, check=False, env={"COLUMNS": "200"})


def test_a_trace_is_scored_and_written(engine_url: str, tiergate_command: list[str], tmp_path: Path) -> None:
    written, figures = tmp_path / "out.json", tmp_path / "figures"
    answer = bench(
        tiergate_command,
        engine_url,
        *("--trace", "azure2023_conv", "--from", "300", "--max-output-tokens", "20", "--max-prompt-tokens", "200"),
        *("--tiers", "chat=0.5:60000/10000,batch=0.5:-/-", "--duration", "3", "--warmup", "1", "--seed", "3"),
        *("--json", str(written), "--figures", str(figures)),
    )
    assert answer.returncode == 0, answer.stderr
    assert "EMULATED" in answer.stdout
    assert "generator lateness" in answer.stdout
    result = json.loads(written.read_bytes())
    assert result["emulated"] is True
    assert result["attainment"] == 1.0
    assert result["settings"]["seed"] == 3
    assert [tier["tier"] for tier in result["score"]["tiers"]] == ["chat", "batch"]
    assert result["score"]["offered"] == len(result["requests"]) > 5
    for request in result["requests"]:
        assert request["end"] == "finished"
        assert 1 <= request["output_tokens"] <= 20
        assert request["ttft_s"] > 0
    assert (figures / "slack.png").read_bytes().startswith(b"\x89PNG")


def test_a_prompt_has_exactly_its_tokens_for_the_emulated_engine(engine_url: str) -> None:
    target = Target(engine_url, MODEL, WordPrompts(1), lengths=Lengths.EMULATED, template_tokens=1)
    for tokens in (2, 100, 5000):
        body = json.loads(target.body_of(PlannedRequest(0, 0.0, "t", Slo(None, None), tokens, 5)))
        asked = json.dumps({"model": MODEL, "messages": body["messages"]}).encode()
        url = engine_url.removesuffix("/v1") + "/tokenize"
        request = urllib.request.Request(url, asked, {"Content-Type": "application/json"})  # noqa: S310 - loopback
        with urllib.request.urlopen(request) as answer:  # noqa: S310 - loopback
            assert json.load(answer)["count"] == tokens


def test_a_short_trace_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,5,5\n")
    options = ["--trace", str(path), "--tiers", "chat=1", "--duration", "20", "--warmup", "0", "--quiet"]
    assert cli.main(["bench", "--url", "http://127.0.0.1:1/v1", "--model", "m", *options]) == cli.FAILED
    assert "lasts only" in capsys.readouterr().out


def test_a_goodput_search_says_its_runs(engine_url: str, tiergate_command: list[str], tmp_path: Path) -> None:
    written, figures = tmp_path / "out.json", tmp_path / "figures"
    answer = bench(
        tiergate_command,
        engine_url,
        *("--poisson", "10", "--prompt-tokens", "20", "--output-tokens", "5", "--duration", "1", "--warmup", "0"),
        *("--tiers", "easy=1:60000/10000", "--goodput", "--low", "0.5", "--high", "1", "--runs", "3"),
        *("--json", str(written), "--figures", str(figures)),
    )
    assert answer.returncode == 0, answer.stderr
    assert "goodput: at least 10 requests/s" in answer.stdout
    found = json.loads(written.read_bytes())["goodput"]
    assert [point["factor"] for point in found["points"]] == [0.5, 1.0]
    assert (figures / "attainment.png").exists()


def test_nothing_finished_is_a_failure(free_port: Callable[[], int], tiergate_command: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    options = ("--poisson", "50", "--duration", "0.5", "--warmup", "0", "--tiers", "chat=1")
    answer = bench(tiergate_command, url, *options)
    assert answer.returncode == cli.FAILED
    assert "connection" in answer.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trace", "arxiv_summarization", "--tiers", "chat=1"), "says no arrivals, or all at once"),
        (("--poisson", "1", "--tiers", "nope=1"), "no SLO is known for 'nope'"),
        (("--poisson", "1", "--tiers", "chat=1", "--duration", "-1"), "measured time must be positive"),
        (("--poisson", "0", "--tiers", "chat=1"), "rate_rps must be positive"),
        (("--trace", "missing.csv", "--tiers", "chat=1"), "no trace 'missing.csv': it is a file"),
        (("--poisson", "1", "--tiers", "chat=1", "--token-ids", "512"), "need the completions route"),
        (("--poisson", "1", "--tiers", "chat=1", "--goodput", "--runs", "1"), "at least 2 runs"),
    ],
)
def test_wrong_usage_is_named(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    assert cli.main(["bench", "--url", "http://127.0.0.1:1/v1", "--model", "m", *options]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_tiers_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text("tiers:\n  - {name: fast, ttft_ms: 500, tpot_ms: 20, share: 0.3}\n  - {name: batch}\n")
    assert read_mix(str(path)).shares == (
        TierShare("fast", Slo(0.5, 0.02), 0.3),
        TierShare("batch", Slo(None, None), 1.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiers: {}", "`tiers` must be a list"),
        ("- 1", "`tiers` must be a list"),
        ("tiers: [1]", "tiers.0 must be a mapping"),
        ("tiers: [{name: a, tpot_ms: -1}]", "tiers.0.tpot_ms"),
        ("tiers: [{name: a, share: x}]", "tiers.0.share must be a number"),
    ],
)
def test_a_wrong_tier_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tiers.yaml"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        read_mix(str(path))


def test_the_gateways_default_tiers_need_no_slo() -> None:
    assert read_mix("chat=1").shares == (TierShare("chat", Slo(2.0, 0.05), 1.0),)


def test_a_search_is_described() -> None:
    points = (Point(0.5, 1.0), Point(2.0, 0.4), Point(1.25, 0.95))
    assert describe(Goodput(0.9, 1.25, 2.0, points), 8.0) == (
        "goodput: 10 requests/s (factor 1.25) for 90 %; missed at 16 requests/s (3 runs)"
    )
    assert describe(Goodput(0.9, None, 0.5, points[:1]), 8.0).startswith("goodput: below 4 requests/s")
