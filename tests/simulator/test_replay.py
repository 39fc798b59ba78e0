"""Replaying recorded engine logs: what the replay does, and what is said about unreadable logs.

How close it comes is in test_validation.py.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.catalogue import load
from simulator.replay import (
    EngineLog,
    Fidelity,
    HostTime,
    LoggedRequest,
    ReplayError,
    compare,
    fit_host_time,
    load_log,
    replay,
    shipped_logs,
)
from tiergate.cli import main
from tiergate.commands.replay import kernel_time
from tiergate_engine.model import EngineConfig
from tiergate_engine.step import StepTime
from tiergate_engine.steptime import RooflineStepTime

FITTED = slice(0, 150)
RTX_PRO = "vllm-rtxpro6000-llama-3.1-8b"
RTX_4090 = "vllm-rtx4090-llama-3.1-8b"
QWEN_32B = "vllm-rtxpro6000x2-qwen3-32b"
QWEN_A3B = "vllm-rtxpro6000x2-qwen3-30b-a3b"


def kernels(log: EngineLog) -> StepTime:
    assert log.profile is not None
    return kernel_time(load(log.profile))


def error(fidelity: Fidelity, quantity: str, name: str) -> float:
    rows = fidelity.ttft if quantity == "ttft" else fidelity.tpot
    return next(row.error for row in rows if row.name == name)


def test_asynchronous_scheduling_is_what_the_log_shows() -> None:
    # The first half begins idle, so its median TTFT is a few steps: one step more or less is plain to see.
    log = load_log(RTX_PRO)
    step_time = kernels(log)
    errors = {}
    for asynchronous in (False, True):
        config = replace(log.config, async_scheduling=asynchronous, host_step_s=0.001)
        fidelity = compare(log, replay(log.requests, config, step_time), FITTED)
        errors[asynchronous] = error(fidelity, "ttft", "P50")
    assert errors[False] < -0.25
    assert abs(errors[True]) < 0.15


def test_without_a_prefix_cache_recomputing_costs_more() -> None:
    log = load_log(RTX_4090)
    cold = replace(log, config=replace(log.config, prefix_caching=False))
    step_time = kernels(log)
    cached_s, cold_s = (replay(each.requests, each.config, step_time).makespan_s for each in (log, cold))
    assert cold_s > 1.01 * cached_s


def test_replaying_is_deterministic() -> None:
    log = load_log(RTX_PRO)
    assert replay(log.requests, log.config, kernels(log)) == replay(log.requests, log.config, kernels(log))


@pytest.mark.parametrize(("kind", "host_s"), [(HostTime.STEP, 0.0019), (HostTime.SEQUENCE, 31e-6)])
def test_host_time_that_was_put_in_is_found_again(kind: HostTime, host_s: float) -> None:
    step_time = RooflineStepTime(c0_s=0.01, per_token_s=3e-5, per_seq_s=1e-5)
    config = EngineConfig(kv_tokens=100_000, max_model_tokens=4000)
    asked = tuple(LoggedRequest(0.05 * i, 100 + 7 * i, 20 + i, 0.0, 0.0) for i in range(40))
    by_step = kind is HostTime.STEP
    put_in = replace(config, host_step_s=host_s) if by_step else replace(config, host_seq_s=host_s)
    made = replay(asked, put_in, step_time)
    served = tuple(
        replace(
            request,
            first_token_s=request.arrival_s + ttft_s,
            last_token_s=request.arrival_s + ttft_s + tpot_s * (request.output_tokens - 1),
        )
        for request, ttft_s, tpot_s in zip(asked, made.ttft_s, made.tpot_s, strict=True)
    )
    log = replace(load_log(RTX_PRO), config=config, requests=served)
    found = fit_host_time(log, step_time, kind, slice(0, 20))
    found_s = found.host_step_s if by_step else found.host_seq_s
    assert found_s == pytest.approx(host_s, rel=0.03)
    assert compare(log, replay(served, found, step_time), slice(20, 40)).tpot_request_error < 0.01


def test_an_idle_engine_waits_for_the_next_arrival() -> None:
    step_time = RooflineStepTime(c0_s=0.01)
    requests = (LoggedRequest(1.0, 10, 3, 1.0, 2.0), LoggedRequest(50.0, 10, 3, 50.0, 51.0))
    made = replay(requests, EngineConfig(kv_tokens=1000, max_model_tokens=100), step_time)
    assert made.ttft_s == pytest.approx((0.01, 0.01))
    assert made.tpot_s == pytest.approx((0.01, 0.01))
    assert made.makespan_s == pytest.approx(50.03)
    assert (made.steps, made.preemptions) == (6, 0)


# --- logs that cannot be read ------------------------------------------------------------------------------

HEAD = {
    "name": "x",
    "hardware": "h",
    "model": "m",
    "engine": "e",
    "profile": "rtxpro6000-llama-3.1-8b-bf16",
    "origin": "o",
    "licence": "l",
    "requests": "x.csv.gz",
    "config": {"kv_tokens": 1000, "max_model_tokens": 500, "max_running_seqs": 8, "max_batched_tokens": 64},
}
COLUMNS = "arrival_s,prompt_tokens,output_tokens,first_token_s,last_token_s"


def write(folder: Path, rows: str, head: dict[str, object] | None = None) -> str:
    (folder / "x.csv.gz").write_bytes(gzip.compress(f"{COLUMNS}\n{rows}\n".encode()))
    path = folder / "x.json"
    path.write_text(json.dumps(HEAD if head is None else head))
    return str(path)


def test_a_log_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    log = load_log(write(tmp_path, "2.0,5,4,2.5,3.0\n1.0,6,4,1.5,2.0"))
    assert [request.arrival_s for request in log.requests] == [1.0, 2.0]
    assert log.config.max_batched_tokens == 64


@pytest.mark.parametrize(
    "row", ["1.0,5,4,2.5", "1.0,x,4,2.5,3.0", "1.0,5,1,2.5,3.0", "1.0,5,4,0.5,3.0", "1,0,4,2,3"]
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str) -> None:
    with pytest.raises(ReplayError, match=r"x\.csv\.gz, line 3"):
        load_log(write(tmp_path, f"1.0,5,4,2.5,3.0\n{row}"))


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="kv_tokns"):
        load_log(write(tmp_path, "", {**HEAD, "kv_tokns": 3}))


def test_a_file_that_is_no_gzip_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "1.0,5,4,2.5,3.0")
    whole = (tmp_path / "x.csv.gz").read_bytes()
    for broken in (b"plain text", whole[:20], whole[:12] + b"\xff" * 30):
        (tmp_path / "x.csv.gz").write_bytes(broken)
        with pytest.raises(ReplayError, match=r"x\.json"):
            load_log(path)


def test_a_missing_log_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=RTX_4090):
        load_log(str(tmp_path / "none.json"))


def test_a_request_that_fits_no_engine_is_named(tmp_path: Path) -> None:
    log = load_log(write(tmp_path, "1.0,5,4,2.5,3.0\n2.0,600,4,2.5,3.0"))
    with pytest.raises(ReplayError, match=r"request 2 of the log.*model length of 500"):
        replay(log.requests, log.config, RooflineStepTime(c0_s=0.01))


# --- the command -------------------------------------------------------------------------------------------


def test_shipped_logs_name_shipped_profiles() -> None:
    assert set(shipped_logs()) == {RTX_PRO, RTX_4090, QWEN_32B, QWEN_A3B}
    for name in shipped_logs():
        log = load_log(name)
        assert log.name == name
        assert log.licence == "MIT"
        assert (log.profile is None) == (name in (QWEN_32B, QWEN_A3B))
        assert log.profile is None or load(log.profile).model == log.model


def test_the_command_prints_both_halves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay"]) == 0
    out = capsys.readouterr().out
    assert "fitted on, requests 1-150" in out
    assert "judged on, requests 151-300" in out
    assert "ms a step" in out
    assert "all, requests 1-300" in out
    assert out.count("TTFT mean") == 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["no-such-log"], 1, RTX_PRO),
        (["--profile", "no-such-profile"], 1, "no-such-profile"),
        (["--fit-requests", "300"], 2, "between 1 and 299"),
        (["--fit-requests", "0"], 2, "between 1 and 299"),
        ([QWEN_32B], 2, "--fit-profile"),
        (["--fit-profile", "--profile", "rtxpro6000-llama-3.1-8b-bf16"], 2, "exclude each other"),
    ],
)
def test_the_command_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert main(["replay", *arguments]) == code
    assert says in capsys.readouterr().err
