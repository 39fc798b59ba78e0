"""Whole programs against a real engine: a foreign load generator, and Tiergate's own commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.real_engine.conftest import RealEngine, RealGateway

LONGEST_S = 240.0


def _run(command: list[str], folder: Path) -> str:
    """Run a program to its end; its output. What it wrote is in the failure."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        stdin=subprocess.DEVNULL,
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


def test_mixed_tiers_through_tiergate_bench(
    vllm: RealEngine, gateway: RealGateway, tiergate_command: list[str], tmp_path: Path
) -> None:
    result = tmp_path / "bench.json"
    command = [*tiergate_command, "bench", "--url", f"{gateway.url}/v1", "--model", vllm.model, "--poisson", "3"]
    command += ["--prompt-tokens", "80", "--output-tokens", "24", "--duration", "12", "--warmup", "2", "--quiet"]
    command += ["--tiers", "fast=0.3,chat=0.4,batch=0.3", "--json", str(result)]
    table = _run(command, tmp_path)
    assert "lateness" in table
    score = json.loads(result.read_text())["score"]
    tiers = {tier["tier"]: tier for tier in score["tiers"]}
    assert set(tiers) == {"fast", "chat", "batch"}
    assert score["overall"]["offered"] == tiers["fast"]["offered"] + tiers["chat"]["offered"]
    for tier in tiers.values():
        assert tier["failed"] == 0
        assert tier["finished"] + tier["refused"] == tier["offered"]
        assert tier["finished"] > 0
    assert tiers["batch"]["refused"] == 0, "best effort is never refused for a promise"
