"""Addresses: the same everywhere for the same run, another for any other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from profiles.catalogue import shipped
from scheduling.tiers import Slo
from simulator.campaign.address import ENTRY, Addresser, AddressError, canonical, code_digest, parse, sources
from simulator.scenario import Arrivals, Cell, Contender, Engines, Fault, FaultKind
from tests.simulator.campaign.fakes import FLEET, WORKLOAD, cell
from workloads.mix import TierShare

ROOT = Path(__file__).resolve().parents[3]
OURS = Addresser("code")


def test_a_cell_comes_back_from_its_canonical_form() -> None:
    fault = Fault(0, FaultKind.SLOW, 1, 2, 3)
    one = replace(cell(), contender=Contender("x", (("a", 1), ("b", 0.5), ("c", True), ("d", "e"))))
    one = replace(one, fleet=replace(one.fleet, faults=(fault,)))
    assert parse(canonical(one)) == one
    assert canonical(parse(canonical(one))) == canonical(one)
    keys = list(json.loads(canonical(one)))
    assert keys == sorted(keys)


def test_equal_cells_have_one_address() -> None:
    assert cell(10) == cell(10.0)
    assert OURS.address(cell(10)) == OURS.address(cell(10.0))


def test_the_address_is_the_same_in_another_process() -> None:
    code = (
        "from simulator.campaign.address import Addresser\n"
        "from tests.simulator.campaign.fakes import cell\n"
        "print(Addresser('code').address(cell()))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert told.stdout.strip() == OURS.address(cell())


@pytest.mark.parametrize(
    "change",
    [
        lambda one: replace(one, rate_rps=10.1),
        lambda one: replace(one, seed=2),
        lambda one: replace(one, warmup_requests=11),
        lambda one: replace(one, measured_requests=11),
        lambda one: replace(one, cooldown_requests=11),
        lambda one: replace(one, contender=Contender("minimal")),
        lambda one: replace(one, contender=Contender("random", (("margin", 1.1),))),
        lambda one: replace(one, workload=replace(WORKLOAD, trace="uniform:100-200/50-101")),
        lambda one: replace(one, workload=replace(WORKLOAD, trace="azure2023_conv")),
        lambda one: replace(one, workload=replace(WORKLOAD, arrivals=Arrivals.TRACE)),
        lambda one: replace(one, workload=replace(WORKLOAD, tiers=(TierShare("t", Slo(1.0, 0.1), 1.0),))),
        lambda one: replace(one, workload=replace(WORKLOAD, invert_at=0.5)),
        lambda one: replace(one, fleet=replace(FLEET, view_age_s=0.1)),
        lambda one: replace(one, fleet=replace(FLEET, engines=(Engines("h100-llama-3.1-8b-bf16", 4),))),
        lambda one: replace(one, fleet=replace(FLEET, engines=(Engines("h200-llama-3.1-8b-bf16", 5),))),
    ],
)
def test_any_other_run_has_another_address(change: Callable[[Cell], Cell]) -> None:
    assert OURS.address(change(cell())) != OURS.address(cell())


def test_other_code_gives_another_address() -> None:
    assert Addresser("other").address(cell()) != OURS.address(cell())


def test_a_file_counts_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    name = shipped()[0]
    content = (ROOT / "profiles" / "shipped" / f"{name}.json").read_bytes()
    addresses = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        profile, trace = tmp_path / folder / f"{folder}.json", tmp_path / folder / f"{folder}.csv"
        profile.write_bytes(content)
        trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n")
        one = replace(cell(), fleet=replace(FLEET, engines=(Engines(str(profile), 4),)))
        one = replace(one, workload=replace(WORKLOAD, trace=str(trace)))
        addresses.append(Addresser("code").address(one))
    assert addresses[0] == addresses[1]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,2\n")
    changed = Addresser("code").address(one)
    profile.write_bytes(content + b" ")
    assert len({addresses[0], changed, Addresser("code").address(one)}) == 3


@pytest.mark.parametrize("what", ["trace", "profile"])
def test_a_file_that_is_not_there_is_named(what: str) -> None:
    one = cell()
    if what == "trace":
        one = replace(one, workload=replace(WORKLOAD, trace="nowhere.csv"))
    else:
        one = replace(one, fleet=replace(FLEET, engines=(Engines("nowhere.json", 1),)))
    with pytest.raises(AddressError, match=f"{what} 'nowhere"):
        OURS.address(one)


@pytest.mark.parametrize("entry", [ENTRY, "simulator.workload"])
def test_the_code_is_all_that_a_run_imports(entry: str) -> None:
    listing = f"import sys, {entry}; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", listing], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    ours = {
        name
        for name in told.stdout.split()
        if name.partition(".")[0]
        in {"tiergate_engine", "scheduling", "profiles", "state", "adapters", "workloads", "simulator"}
    }
    reached = sources(entry)
    assert ours <= set(reached)
    assert {"scheduling.tiers", "workloads.traces", "tiergate_engine.step"} <= ours
    beside = ("simulator.campaign", "simulator.report", "simulator.planning")
    assert not any(name.startswith(beside) for name in reached)


def test_code_that_is_not_there_is_said() -> None:
    with pytest.raises(AddressError, match=r"simulator\.nothing"):
        code_digest("simulator.nothing")
