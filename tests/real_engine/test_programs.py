"""Whole programs against a real engine: a foreign load generator, and Tiergate's own commands."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from profiles import load
from tests.conftest import StartServer
from tests.real_engine.conftest import RealEngine, RealGateway

LONGEST_S = 240.0
_QUICK = ("--max-seconds", "30", "--max-seqs", "16")  # enough for a fit; its figures are printed, never asserted


def _run(command: list[str], folder: Path) -> str:
    """Run a program to its end; its output. What it wrote is in the failure."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "180"},
        check=False,
    )
    assert done.returncode == 0, (
        f"{command[:3]} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout


def test_vllm_bench_serve_finds_an_openai_server(vllm: RealEngine, gateway: RealGateway, tmp_path: Path) -> None:
    command = [
        str(vllm.files.programs / "vllm"),
        "bench",
        "serve",
        "--backend",
        "openai",
        "--base-url",
        gateway.url,
    ]
    command += ["--model", vllm.model, "--tokenizer", str(vllm.files.model), "--dataset-name", "random"]
    command += [
        "--random-input-len",
        "60",
        "--random-output-len",
        "20",
        "--num-prompts",
        "30",
        "--request-rate",
        "6",
    ]
    command += ["--ignore-eos", "--save-result", "--result-filename", "foreign.json", "--disable-tqdm"]
    _run(command, tmp_path)
    result = json.loads((tmp_path / "foreign.json").read_text())
    assert result["completed"] == 30
    assert result["total_output_tokens"] == 30 * 20


def _bench(command: list[str], url: str, model: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Mixed-tier load for a few seconds; what was printed, and the JSON result."""
    result = folder / "bench.json"
    command = [
        *command,
        "bench",
        "--url",
        f"{url}/v1",
        "--model",
        model,
        "--poisson",
        "3",
        "--prompt-tokens",
        "80",
    ]
    command += ["--output-tokens", "24", "--duration", "12", "--warmup", "2", "--quiet", "--json", str(result)]
    printed = _run([*command, "--tiers", "fast=0.3,chat=0.4,batch=0.3"], folder)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return printed, loaded


def _nothing_is_lost(result: dict[str, Any]) -> None:
    tiers = {tier["tier"]: tier for tier in result["score"]["tiers"]}
    assert set(tiers) == {"fast", "chat", "batch"}
    assert result["score"]["overall"]["offered"] == tiers["fast"]["offered"] + tiers["chat"]["offered"]
    for tier in tiers.values():
        assert tier["failed"] == 0
        assert tier["finished"] + tier["refused"] == tier["offered"]
    assert tiers["batch"]["finished"] == tiers["batch"]["offered"], "best effort is never refused for a promise"


def test_mixed_tiers_on_an_engine_nobody_measured(
    vllm: RealEngine, gateway: RealGateway, tiergate_command: list[str], tmp_path: Path
) -> None:
    printed, result = _bench(tiergate_command, gateway.url, vllm.model, tmp_path)
    _nothing_is_lost(result)
    assert all(tier["refused"] == 0 for tier in result["score"]["tiers"]), (
        "nothing is refused before it is measured"
    )
    assert "generator lateness" in printed
    assert "EMULATED" not in printed


def test_a_measured_profile_serves_mixed_tiers(
    vllm: RealEngine,
    start_server: StartServer,
    free_port: Callable[[], int],
    tiergate_command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "measured.json"
    measured = _run(
        [*tiergate_command, "profile", "--url", vllm.url, *_QUICK, "--out", str(file)],
        tmp_path,
    )
    profile = load(file)
    assert profile.step_time.decode_seconds(1, 100) > 0
    port = free_port()
    backend = f"{vllm.url},profile={file}"
    start_server(
        [*tiergate_command, "serve", "--backend", backend, "--port", str(port)], port, ready_path="/readyz"
    )
    printed, result = _bench(tiergate_command, f"http://127.0.0.1:{port}", vllm.model, tmp_path)
    _nothing_is_lost(result)
    assert "TTFT prediction error" in printed
    with capsys.disabled():  # the figures of this run: they are documented, never asserted
        print(f"\n{measured}\n{printed}")
