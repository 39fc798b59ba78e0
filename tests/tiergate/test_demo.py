"""The demo: it runs end to end on emulated engines, and leaves nothing behind however it ends."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tiergate.commands import CommandFailed
from tiergate.demo.run import run_demo
from tiergate.demo.show import LiveView, comparison
from tiergate.demo.sizes import EMULATED, POLICIES, Load, Size

SMALL = replace(
    EMULATED,
    backends=2,
    load=Load(
        source=("--poisson", "4", "--prompt-tokens", "64", "--output-tokens", "10"),
        rate_factor=1.0,
        slice_s=0.0,
        lengths="emulated",
        warmup_s=0.5,
        measured_s=3.0,
        cooldown_s=0.0,
    ),
    seeds=(1, 2),
    side_by_side=2,
)


@pytest.fixture
def console() -> Console:
    return Console(width=100, file=io.StringIO())


async def test_every_policy_and_seed_is_run_and_compared(tmp_path: Path, console: Console) -> None:
    with LiveView(SMALL, console) as view:
        outcomes = await run_demo(SMALL, ("polyserve", "round_robin"), None, tmp_path, view)

    assert [(one.policy, one.seed) for one in outcomes] == [
        ("polyserve", 1),
        ("polyserve", 2),
        ("round_robin", 1),
        ("round_robin", 2),
    ]
    # a load this light is served by anyone
    assert all(one.attainment == 1.0 for one in outcomes)
    # round robin keeps both backends all the time; polyserve takes what it needs
    for mine, theirs in zip(outcomes[:2], outcomes[2:], strict=True):
        assert 0 < mine.backend_seconds < theirs.backend_seconds
    for one in outcomes:
        # a router without tiers is denied no place for a promise that it never looked at
        assert one.bench.score.overall.refused == 0
        assert one.bench.predictions.ttft.count == one.bench.score.overall.offered
    shown = Console(width=100, record=True, file=io.StringIO())
    shown.print(comparison(SMALL, outcomes))
    text = shown.export_text()
    assert "EMULATED" in text
    assert "polyserve" in text


async def test_what_a_command_said_is_told_when_it_fails(tmp_path: Path, console: Console) -> None:
    broken = replace(SMALL, load=replace(SMALL.load, source=("--trace", "no-such-trace")))
    with LiveView(broken, console) as view, pytest.raises(CommandFailed, match="no-such-trace"):
        await run_demo(broken, ("polyserve",), None, tmp_path, view)


def test_the_sizes_stay_below_what_two_cores_carry() -> None:
    assert POLICIES[0] == "polyserve"
    for size in (EMULATED, SMALL):
        assert abs(sum(tier.share for tier in size.tiers) - 1.0) < 1e-9
    assert _minutes(EMULATED) < 4.0


def _minutes(size: Size) -> float:
    load = size.load
    runs = len(POLICIES) * -(-len(size.seeds) // size.side_by_side)
    return runs * (load.warmup_s + load.measured_s + load.cooldown_s + 12.0) / 60


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tiergate", "demo", "--keep", str(tmp_path), "--seeds", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_running(
    demo: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    config = tmp_path / "gateway-polyserve-1.yaml"
    _wait_for((tmp_path / "bench-polyserve-1.log").exists)
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    ports = [settings["port"], *(int(one["url"].rpartition(":")[2]) for one in settings["backends"])]
    assert all(map(_listens, ports))

    os.kill(demo.pid, number)

    assert demo.wait(timeout=30) == 130
    assert not any(map(_listens, ports))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(happened: Callable[[], bool], within_s: float = 60.0) -> None:

    end_s = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < end_s, "the demo did not come up"
        time.sleep(0.1)
