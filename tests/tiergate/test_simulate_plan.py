"""`tiergate simulate plan` from its command line to its files, with every trace format. About 15 s."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from simulator.planning.demand import Window
from simulator.planning.result import Held, PlannedWindow
from tiergate import cli
from tiergate.commands import UsageError
from tiergate.commands.simulate_plan import _DEFAULT_PROFILE, _seconds
from tiergate.simulate.plan_show import tenths

TIERS = """\
default_tier: loose
tiers:
  - {name: tight, ttft_ms: 500, tpot_ms: 20, share: 0.5}
  - {name: loose, ttft_ms: 1000, tpot_ms: 100, on_miss: relegate}
"""
SMALL = ("--quick", "--seeds", "1", "--requests", "60", "--jobs", "1", "--quiet", "--window", "1m")


def rows(count: int = 120) -> Iterator[tuple[float, int, int]]:
    """Arrivals in two minutes, prompts, answers."""
    rng = random.Random(3)
    for place in range(count):
        yield 120.0 * place / count, rng.randint(50, 400), rng.randint(2, 12)


def ours() -> str:
    return "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{at},{p},{o}\n" for at, p, o in rows())


def azure() -> str:
    lines = (f"2023-11-16 18:{int(at) // 60:02}:{at % 60:09.6f},{p},{o}\n" for at, p, o in rows())
    return "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(lines)


def burstgpt() -> str:
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    return head + "".join(f"{at},ChatGPT,{p},{o},{p + o},API log\n" for at, p, o in rows())


def mooncake() -> str:
    return "".join(
        json.dumps({"timestamp": int(1e3 * at), "input_length": p, "output_length": o, "hash_ids": [1, 2]}) + "\n"
        for at, p, o in rows()
    )


def bailian() -> str:
    return "".join(
        json.dumps({"chat_id": 1, "timestamp": at, "input_length": p, "output_length": o, "hash_ids": [1]}) + "\n"
        for at, p, o in rows()
    )


def log(models: tuple[str, ...] = ("m",)) -> str:
    """The gateway's own: two tiers with promises of their own, and some that were refused."""
    lines = []
    for place, (at, prompt, output) in enumerate(rows()):
        refused = place % 20 == 7
        code = place % 3 == 0
        line = {
            "request_id": f"r{place}",
            "tenant": "t",
            "model": models[place % len(models)],
            "tier": "code" if code else "chat",
            "end": "refused" if refused else "finished",
            "promised_ttft_s": 0.5 if code else 2.0,
            "promised_tpot_s": 0.02 if code else 0.05,
            "sequences": 1,
            "prompt_tokens": prompt,
            "output_tokens": 0 if refused else output,
            "seconds": 1.0,
            "time": 1_700_000_000.0 + at,
        }
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def run(trace: Path, *more: str) -> int:
    return cli.main(["simulate", "plan", "--trace", str(trace), *SMALL, *more])


@pytest.fixture
def tiers(tmp_path: Path) -> str:
    path = tmp_path / "tiers.yaml"
    path.write_text(TIERS)
    return str(path)


@pytest.mark.parametrize("made", [ours, azure, burstgpt, mooncake, bailian], ids=lambda made: made.__name__)
def test_every_format_is_planned(
    made: Callable[[], str], tmp_path: Path, tiers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    trace.write_text(made())
    assert run(trace, "--tiers", tiers, "--json") == cli.DONE
    told = capfd.readouterr()
    found = json.loads(told.out)
    assert found["simulated"]
    assert [one["requests"] for one in found["windows"]] == [60, 60]
    assert [one["backends"] for one in found["windows"]] == [1, 1]
    assert [(tier["name"], round(tier["share"], 3)) for tier in found["tiers"]] == [
        ("tight", 0.333),
        ("loose", 0.667),
    ]
    assert found["reached"]
    assert "took" in told.err


def test_the_request_log_keeps_its_tiers_and_promises(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "requests.jsonl"
    trace.write_text(log())
    assert run(trace, "--json") == cli.DONE
    found = json.loads(capfd.readouterr().out)
    assert found["own_tiers"]
    assert found["guessed"] == 6
    assert [(tier["name"], tier["slo"]) for tier in found["tiers"]] == [
        ("code", {"ttft_s": 0.5, "tpot_s": 0.02}),
        ("chat", {"ttft_s": 2.0, "tpot_s": 0.05}),
    ]
    assert found["tiers"][0]["share"] == pytest.approx(1 / 3)
    # Promises that are given take the place of the log's; who asked for what stays.
    assert run(trace, "--json", "--tiers", "code=1:500/30,chat=1:1000/100") == cli.DONE
    given = json.loads(capfd.readouterr().out)
    assert given["own_tiers"]
    assert given["tiers"][0] == {
        "name": "code",
        "share": pytest.approx(1 / 3),
        "slo": {"ttft_s": 0.5, "tpot_s": 0.03},
    }
    assert run(trace) == cli.DONE
    assert "6 requests that the log saw refused or lost" in " ".join(capfd.readouterr().out.split())


def test_a_log_of_several_models_is_planned_for_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "requests.jsonl"
    trace.write_text(log(("small", "large")))
    assert run(trace) == cli.USAGE
    assert "--model" in (told := capfd.readouterr().err)
    assert "small (60 requests)" in told
    assert run(trace, "--model", "huge") == cli.USAGE
    assert "'huge'; it has" in capfd.readouterr().err
    assert run(trace, "--model", "large", "--json") == cli.DONE
    assert json.loads(capfd.readouterr().out)["requests"] == 60


def test_the_whole_answer_fits_80_columns_and_is_written(
    tmp_path: Path, tiers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(ours())
    out = tmp_path / "out"
    arguments = ["simulate", "plan", "--trace", str(trace), "--tiers", tiers, "--out", str(out), "--target", "0.9"]
    arguments += ["--seeds", "2", "--requests", "60", "--window", "1m", "--rate-factor", "40", "--jobs", "2"]
    assert cli.main([*arguments, "--price-per-hour", "3"]) == cli.DONE
    told = capfd.readouterr()
    assert max(map(len, told.out.splitlines())) <= 80
    for words in (
        "SIMULATED",
        "Backends since the start of the trace",
        "Silos",
        "What each promise costs",
        "TPOT as loose",
        "money/1k",
        "traffic gone",
    ):
        assert words in told.out
    found = json.loads((out / "plan.json").read_bytes())
    assert found["silos"]["backends"] >= 2
    changes = [(one["tier"], one["relaxed_to"]) for one in found["costs"]["savings"]]
    assert changes == [("tight", "loose"), ("tight", None), ("loose", None)]
    for one in found["costs"]["savings"]:
        if one["relaxed_to"] is None:
            assert one["per_request_s"]["mean"] > 0
    page = (out / "plan.html").read_text()
    for words in ("No engine ran", "<svg", "--rate-factor 40", "What each promise costs"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    # What is stored does not run again, and gives the same bytes.
    before = (out / "plan.json").read_bytes()
    assert cli.main([*arguments, "--price-per-hour", "3", "--json"]) == cli.DONE
    again = capfd.readouterr()
    assert "0 cells ran" in again.err
    assert again.out.encode() == before


def test_a_promise_that_nothing_keeps_is_told_and_ends_with_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(ours())
    assert run(trace, "--tiers", "instant=1:500/1,loose=1:1000/100") == cli.FAILED
    told = " ".join(capfd.readouterr().out.split())
    assert "even an idle engine misses the promise of 100 % of instant" in told
    assert "out of reach for instant" in told
    assert run(trace, "--tiers", "instant=1:500/1") == cli.FAILED
    assert "no number of backends is enough: loosen --tiers" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target", "1"], "--target"),
        (["--target", "99"], "--target"),
        (["--target", "most"], "--target"),
        (["--tiers", "gone.yaml"], "--tiers: there is no file"),
        (["--tiers", "fast=x:1/1"], "--tiers"),
        (["--profile", "abacus"], "--profile"),
        (["--policy", "polyservo"], "--policy"),
        (["--window", "soon"], "--window"),
        (["--window", "1s"], "--window: 1 s is too short: a request stays"),
        (["--rate-factor", "0"], "--rate-factor"),
        (["--seeds", "0"], "--seeds"),
        (["--requests", "1.5"], "--requests"),
        (["--price-per-hour", "-1"], "--price-per-hour"),
        (["--startup-s", "-1"], "--startup-s"),
        (["--trace", "nowhere.csv"], "--trace"),
        (["--model", "m"], "--model"),
    ],
)
def test_wrong_usage_names_the_option(
    arguments: list[str], named: str, tmp_path: Path, tiers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(ours())
    assert run(trace, "--tiers", tiers, *arguments) == cli.USAGE
    assert named in capfd.readouterr().err


def test_tiers_are_needed_where_the_trace_has_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(ours())
    assert run(trace) == cli.USAGE
    assert "--tiers: is needed" in capfd.readouterr().err
    trace.write_text("prompt_tokens,output_tokens\n10,10\n")
    assert run(trace, "--tiers", "chat=1:1000/50") == cli.USAGE
    assert "needs arrivals" in capfd.readouterr().err


def test_a_small_day_is_folded_with_a_hint_and_the_default_profile_is_told(
    tmp_path: Path, tiers: str, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(ours())
    assert run(trace, "--tiers", tiers) == cli.DONE
    told = " ".join(capfd.readouterr().out.split())
    assert "2 windows in 1 lines" not in told
    assert "2 windows in 1 line:" in told
    assert "00:01" not in told
    assert "--rate-factor" in told
    assert f"No --profile was given: {_DEFAULT_PROFILE} is the default" in told
    assert run(trace, "--tiers", tiers, "--window", "2m", "--profile", _DEFAULT_PROFILE) == cli.DONE
    told = " ".join(capfd.readouterr().out.split())
    assert "1 window of 2 min" in told.replace("120 s", "2 min")
    assert "No --profile" not in told


def test_what_tiers_hold_adds_up_to_the_fleet() -> None:
    window = Window(0.0, 60.0, 10, 1.0, 0.5, 0)
    third = Held((("a", 1 / 3), ("b", 1 / 3), ("c", 1 / 3)), 0.0)
    one = PlannedWindow(window, 1, third, 0, scaled=False, borderline=False)
    assert sum(10 * float(value) for value in tenths(one).values()) == pytest.approx(10)
    assert sorted(tenths(one).values()) == ["0.0", "0.3", "0.3", "0.4"]
    more = replace(one, backends=6, held=Held((("a", 2.25), ("b", 2.25), ("c", 0.25)), 1.25))
    assert sum(10 * float(value) for value in tenths(more).values()) == pytest.approx(60)


def test_times_are_read() -> None:
    assert [_seconds(text) for text in ("90", "90s", "15m", "1.5h", "2 d")] == [90, 90, 900, 5400, 172_800]
    for text in ("", "m", "0s", "1y"):
        with pytest.raises(UsageError, match="--window"):
            _seconds(text)
