"""`tiergate simulate` from its command line to its files, on a fleet that takes seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from simulator.scenario import Arrivals, Fault, FaultKind, Knob
from tiergate import cli
from tiergate.commands import UsageError
from tiergate.simulate.options import Given, Options, read_file
from tiergate.simulate.scenario import DEFAULTS, OPTIONS, contender, read

SCENARIO = """\
trace: uniform:50-150/5-15
tiers:
  - {name: tight, ttft_ms: 500, tpot_ms: 20, share: 0.5}
  - {name: loose, ttft_ms: 1000, tpot_ms: 100, share: 0.5}
backends: 2
policy: [polyserve_co, "random:chunk_tokens=512"]
rate: [20, 60]
seeds: 2
requests: 60
warmup: 10
cooldown: 10
"""


@dataclass(frozen=True, slots=True)
class Ran:
    folder: Path
    scenario: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The tiny scenario, really run, with its report."""
    folder = tmp_path_factory.mktemp("simulate")
    scenario = folder / "tiny.yaml"
    scenario.write_text(SCENARIO)
    capture = pytest.MonkeyPatch()
    out, err = _Text(), _Text()
    with capture.context() as patch:
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        code = cli.main(["simulate", "--scenario", str(scenario), "--out", str(folder / "out"), "--jobs", "2"])
    assert code == cli.DONE, err.text
    return Ran(folder / "out", scenario, out.text, err.text)


class _Text:
    """A stream that keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_the_answer_fits_80_columns_and_says_what_it_is(ran: Ran) -> None:
    assert "SIMULATED: uniform:50-150/5-15 on 2 x h200-llama-3.1-8b-bf16" in ran.out
    assert "20 requests/s" in ran.out
    assert "60 requests/s" in ran.out
    for word in (
        "polyserve_co",
        "random(chunk_tokens=512)",
        "worst",
        "tight",
        "loose",
        "TTFT P50",
        "inst·s",
    ):
        assert word in ran.out
    assert ran.out.index("In short") < ran.out.index("in the worst tier") < ran.out.index("promised")
    assert max(map(len, ran.out.splitlines())) <= 80


def test_progress_goes_to_the_other_stream(ran: Ran) -> None:
    assert "8 cells ran" in ran.err
    assert "cells ran" not in ran.out


def test_the_report_is_written(ran: Ran) -> None:
    results = json.loads((ran.folder / "results.json").read_bytes())
    assert pq.read_table(ran.folder / "cells.parquet").to_pylist() == results["cells"]
    assert len(results["cells"]) == 8
    assert {row["attainment"] for row in results["cells"]} != {0.0}
    kinds = [mark["kind"] for mark in results["study"]["marks"]]
    assert kinds == ["reference", "upper bound", "upper bound", "upper bound"]
    text = (ran.folder / "report.html").read_text()
    assert "tiergate simulate --scenario" in text
    assert "No engine ran" in text
    assert "H200" in text
    assert "In short" in text
    assert "chunk_tokens=best" not in text  # its random has a budget of its own
    assert "s are measured, and a request may stay for" in text
    assert (ran.folder / "figures" / "s1-attainment.png").stat().st_size > 1000
    assert (ran.folder / "figures" / "s1-gradient-1.png").stat().st_size > 1000


def test_stored_runs_do_not_run_again_and_give_the_same_numbers(
    ran: Ran, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["simulate", "--scenario", str(ran.scenario), "--store", str(ran.folder / "runs"), "--json"]
    assert cli.main(arguments) == cli.DONE
    told = capfdbinary.readouterr()
    assert b"0 cells ran, 8 were stored" in told.err
    assert json.loads(told.out)["cells"] == json.loads((ran.folder / "results.json").read_bytes())["cells"]


def test_another_run_from_nothing_gives_the_same_bytes(
    ran: Ran, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    options = ["--rate", "60", "--policy", "polyserve_co", "--jobs", "1", "--quiet", "--json"]
    assert cli.main(["simulate", "--scenario", str(ran.scenario), *options, "--store", str(tmp_path)]) == cli.DONE
    found = json.loads(capfdbinary.readouterr().out)["cells"]
    before = json.loads((ran.folder / "results.json").read_bytes())["cells"]
    assert found == [row for row in before if row["rate_rps"] == 60 and row["contender"] == "polyserve_co"]
    assert len(found) == 2


def test_a_run_that_fails_is_a_failure_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiers", "x=1:0.001/-", "--rate", "5", "--seeds", "1", "--requests", "5", "--policy", "random"]
    assert cli.main(["simulate", *options, "--jobs", "1", "--quiet"]) == cli.FAILED
    told = capsys.readouterr().err
    assert "1 of 1 runs failed" in told
    assert "can be served by an idle engine at the promise of x" in told


def test_the_list_names_traces_profiles_and_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--list"]) == cli.DONE
    told = " ".join(capsys.readouterr().out.split())
    for word in (
        "azure2023_conv",
        "h200-llama-3.1-8b-bf16",
        "polyserve_co",
        "promotion=lazy",
        "lazy, eager, never",
    ):
        assert word in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trace", "nope"), "--trace: no trace 'nope'"),
        (("--trace", "uniform:9-1/1-2"), "--trace: 'uniform:9-1/1-2' must read"),
        (("--tiers", "nope=1"), "--tiers: no SLO is known for 'nope'"),
        (("--tiers", "a=1:500/0.001"), "--tiers:"),
        (("--ttft-ms", "500,fast"), "--ttft-ms: must be a number, not 'fast'"),
        (("--arrivals", "never"), "--arrivals: must be poisson or trace, not 'never'"),
        (("--arrivals", "trace", "--trace", "uniform:5-9/5-9"), "has lengths only; take poisson"),
        (("--prefixes",), "--prefixes: azure2023_conv has no prefix blocks"),
        (("--invert-at", "2"), "--invert-at: is a part of the measured requests"),
        (("--profile", "h200"), "--profile: no profile is named 'h200'; did you mean"),
        (("--profile", "h200-llama-3.1-8b-bf16=0"), "must read NAME=COUNT"),
        (("--profile", "a", "--profile", "b=2"), "'a' needs its number in a mixed fleet, such as a=4"),
        (("--profile", "h200-llama-3.1-8b-bf16=2", "--backends", "2"), "--backends: the profiles name their own"),
        (("--backends", "0"), "--backends: must be at least 1, not 0"),
        (("--backends", "two"), "--backends: must be a whole number, not 'two'"),
        (("--t0-ms", "0.1"), "--t0-ms: h200-llama-3.1-8b-bf16: a fixed part of 0.1 ms is less than"),
        (("--prefill-backends", "8"), "--prefill-backends: must leave a backend to decode: fewer than 8"),
        (("--policy", "polyserv_co"), "--policy: no policy is named 'polyserv_co'; did you mean polyserve_co?"),
        (("--policy", "polyserve"), "--policy: no policy is named 'polyserve'; did you mean polyserve_co or"),
        (("--policy", "random,polyserve"), "--policy: no policy is named 'polyserve'"),
        (("--policy", "polyserve_pd", "--backends", "1"), "--backends: polyserve_pd is disaggregated: it needs 2"),
        (
            ("--fault", "slow:backend=1,from=0,for=1"),
            "--fault: factor is missing in 'slow:backend=1,",
        ),
        (("--sweep", "90%"), "--sweep: must be a number, not '90%'; write 0.9"),
        (
            ("--policy", "polyserve_co:promotion"),
            "--policy: 'promotion' in 'polyserve_co:promotion' must read KNOB",
        ),
        (("--policy", "polyserve_co:promotion=often"), "--policy: polyserve_co: knob promotion is one of"),
        (("--policy", "random:chunk_tokens=big"), "--policy: random: knob chunk_tokens takes a int"),
        (("--fault", "down:backend=8,from=1,for=1"), "--fault: backends are numbered from 0 to 7, not 8"),
        (("--fault", "burns:backend=1"), "--fault: 'burns:backend=1' is not understood; write down:backend=3"),
        (("--fault", "slow:backend=1,from=0,for=1,factor=0.5"), "factor at least 1"),
        (("--fault", "down:backend=x,from=0,for=1"), "has something that is no number"),
        (("--rate", "0"), "--rate: must be above 0, not 0"),
        (("--rate", "1e-9"), "--rate: must be at least 0.0001 requests/s, not 1e-09"),
        (("--rate", "1e300"), "--rate: must be at most 1e+09, not 1e300"),
        (("--requests", "9" * 30), "--requests: must be at most 1e+09"),
        (
            ("--fault", "down:backend=0,from=0,for=inf"),
            "from and for are at most 1e+06 s and factor at most 10000",
        ),
        (("--rate", "1", "--sweep", "1"), "--sweep: leave out this or --rate"),
        (("--tiers", "a=1:500/-"), "--rate: is needed: no tier has a TPOT"),
        (("--requests", "0"), "--requests: must be at least 1, not 0"),
        (("--seeds", "none"), "--seeds: must be a whole number, not 'none'"),
        (("--jobs", "0"), "--jobs: must be at least 1, not 0"),
        (("--scenario", "missing.yaml"), "--scenario: missing.yaml: No such file"),
    ],
)
def test_wrong_usage_names_the_flag_and_the_remedy(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.main(["simulate", *options]) == cli.USAGE
    assert message in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["simulate", "--requests", "20", "--rate", "5", "--store", str(tmp_path / "file" / "runs")]
    assert cli.main(arguments) == cli.FAILED
    told = capsys.readouterr().err
    assert "Not a directory" in told
    assert "runs failed" not in told


def test_a_report_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["simulate", "--out", str(tmp_path / "file" / "report")]) == cli.FAILED
    told = capsys.readouterr().err
    assert "--out: " in told
    assert "Not a directory" in told
    assert "cells ran" not in told


def test_options_before_a_subcommand_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["simulate", "--policy", "random", "--quiet", "plan", "--trace", "azure2023_conv"])
    assert stopped.value.code == cli.USAGE
    assert "--policy, --quiet before 'plan' would be dropped" in capsys.readouterr().err


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_what_does_nothing_is_told(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "20", "--seeds", "1", "--policy", "random", "--fault", "down:backend=1,from=900,for=1"]
    options += [
        "--tiers",
        "a=0.5:500/20,b=0.4:500/-",
        "--view-age-ms",
        "50",
        "--prefill-backends",
        "1",
        "--quiet",
        "--jobs",
        "1",
    ]
    assert cli.main(["simulate", "--scenario", str(ran.scenario), *options]) == cli.DONE
    told = " ".join(capsys.readouterr().out.split())
    assert "Faults: backend 1 down from 900 s for 1 s. Runs took" in told
    assert "begins 900 s after the start, and no run lasted longer than" in told
    assert "--view-age-ms does nothing with one gateway replica" in told
    assert "--prefill-backends does nothing" in told
    assert "sum to 0.9 and were rescaled: a 55.6 %, b 44.4 %" in told
    assert "random:chunk_tokens=best" in told
    assert "-: nothing to keep" in told


def test_the_best_budget_is_tried_first_and_named(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "60", "--policy", "lmetric:chunk_tokens=best", "--quiet"]
    options += ["--seeds", "1", "--requests", "20", "--jobs", "1"]
    assert cli.main(["simulate", "--scenario", str(ran.scenario), *options]) == cli.DONE
    told = " ".join(capsys.readouterr().out.split())
    assert "the best budget of short runs (one seed, 10 requests" in told
    assert "4096 keeps" in told
    assert "lmetric(chunk_tokens=" in told
    assert "best)" not in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "must be a mapping of options"),
        ("{", "s.yaml is not valid YAML: line 1, column 2: expected the node content"),
        (
            "tiers: [{name: a, tpot: 20}]",
            "s.yaml: tiers: tiers.0: tpot is no key of a tier; did you mean",
        ),
        ("polcy: random", "polcy is no option of a scenario; did you mean `policy`?"),
        ("rate: {a: 1}", "rate must be a value or a list of values"),
        ("rate: fast", "s.yaml: rate: must be a number, not 'fast'"),
        ("prefixes: maybe", "s.yaml: prefixes: must be true or false, not 'maybe'"),
        ("tiers: [{name: a, share: x}]", "s.yaml: tiers: "),
    ],
)
def test_a_wrong_scenario_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert cli.main(["simulate", "--scenario", str(path)]) == cli.USAGE
    assert message in capsys.readouterr().err


def options_of(**given: str) -> Options:
    return Options({name: Given((value,), f"--{name}") for name, value in given.items()}, DEFAULTS)


def test_nothing_said_is_polyserves_mix_on_eight_h200() -> None:
    scenario = read(options_of())
    cell = scenario.cells[0]
    assert cell.fleet.backends == 8
    assert [tier.slo.tpot_s for tier in cell.workload.tiers] == [0.02, 0.03, 0.05, 0.1]
    assert cell.workload.ttft_s == (0.3, 0.5, 1.0)
    assert {cell.contender.name for cell in scenario.cells} == {"polyserve_co", "random", "least_load"}
    assert scenario.reference_rps is not None
    assert cell.rate_rps == pytest.approx(0.9 * scenario.reference_rps, rel=1e-3)


def test_every_option_reaches_the_cell() -> None:
    scenario = read(
        options_of(
            trace="azure2023_code",
            arrivals="trace",
            tiers="a=1:800/50",
            invert_at="0.5",
            profile="h200-llama-3.1-8b-bf16=3",
            t0_ms="5",
            replicas="4",
            view_age_ms="100",
            startup_s="30",
            host_step_ms="1",
            host_seq_us="20",
            fault="slow:backend=2,from=1,for=2.5,factor=3",
            rate="7",
            seeds="1",
            requests="10",
            warmup="0",
            cooldown="3",
            policy="polyserve_co:promotion=never,margin=2,pool=false",
        )
    )
    (cell,) = scenario.cells
    fleet, work = cell.fleet, cell.workload
    assert (work.trace, work.arrivals, work.invert_at) == ("azure2023_code", Arrivals.TRACE, 0.5)
    assert work.ttft_s == ()
    assert fleet.engines[0].step_floor_s == 0.005
    assert (fleet.replicas, fleet.view_age_s, fleet.startup_s) == (4, 0.1, 30.0)
    assert (fleet.host_step_s, fleet.host_seq_s) == (0.001, 2e-5)
    assert fleet.faults == (Fault(2, FaultKind.SLOW, 1.0, 2.5, 3.0),)
    assert (cell.rate_rps, cell.seed) == (7.0, 1)
    assert (cell.warmup_requests, cell.measured_requests, cell.cooldown_requests) == (0, 10, 3)
    assert cell.contender.knobs == (("margin", 2), ("pool", False), ("promotion", "never"))


def test_a_mixed_fleet_is_packed_kind_by_kind() -> None:
    def best(*profiles: str) -> float:
        given = {"profile": Given(profiles, "--profile"), "seeds": Given(("1",), "--seeds")}
        found = read(Options(given, DEFAULTS)).reference_rps
        assert found is not None
        return found

    h200, h100 = "h200-llama-3.1-8b-bf16", "h100-llama-3.1-8b-bf16"
    assert best(f"{h200}=4", f"{h100}=1") == pytest.approx(best(f"{h200}=4") + best(f"{h100}=1"), rel=1e-6)
    assert best(f"{h200}=1") == pytest.approx(best(f"{h200}=4") / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "knobs"),
    [
        ("random", ()),
        ("co_chunk:chunk_tokens=256", (("chunk_tokens", 256),)),
        ("polyserve_co:pool=true,margin=1.5", (("margin", 1.5), ("pool", True))),
    ],
)
def test_knobs_are_read_in_their_types(text: str, knobs: tuple[tuple[str, Knob], ...]) -> None:
    assert contender(text, options_of()).knobs == knobs


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("random, minimal", ["random", "minimal"]),
        ("random:margin=2,lengths=known,minimal", ["random(lengths=known, margin=2)", "minimal"]),
        ("random,minimal:margin=2", ["random", "minimal(margin=2)"]),
    ],
)
def test_policies_may_be_separated_by_commas(text: str, labels: list[str]) -> None:
    cells = read(options_of(policy=text, seeds="1", rate="5")).cells
    assert [cell.contender.label for cell in cells] == labels


def test_flags_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("view-age-ms: 50\nprefixes: true\n")
    given = read_file(path, OPTIONS)
    assert given["view_age_ms"] == Given(("50",), f"{path}: view-age-ms")
    assert Options(given, DEFAULTS).on("prefixes")
    with pytest.raises(UsageError, match=r"s\.yaml: view-age-ms: must be at least 100, not 50"):
        Options(given, DEFAULTS).number("view_age_ms", 100)
