"""Profile files: what is shipped loads, what is wrong is refused with the place named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import profiles
from profiles.format import ProfileError, Source, dump, parse
from tiergate_engine.step import Step

Raw = dict[str, Any]  # a parsed JSON file, to be spoilt


def _raw(name: str = "rtxpro6000-qwen3-32b-bf16") -> Raw:
    raw: Raw = json.loads(dump(profiles.load(name).file))
    return raw


@pytest.mark.parametrize("name", profiles.shipped())
def test_shipped_profiles_are_whole(name: str) -> None:
    profile = profiles.load(name)
    assert profile.name == name
    provenance = profile.file.provenance
    assert provenance.licence in {"Apache-2.0", "MIT"}
    assert provenance.origin
    assert provenance.conditions
    assert profile.limits.kv_tokens is not None
    regimes = profile.file.regimes
    assert regimes.decode.error is not None
    assert regimes.mixed.error is not None
    assert profile.p90_error == max(regimes.decode.error.p90, regimes.mixed.error.p90)
    assert parse(dump(profile.file), name) == profile


@pytest.mark.parametrize("name", profiles.shipped())
def test_shipped_profiles_are_plausible(name: str) -> None:
    step_time = profiles.load(name).step_time
    one, many = step_time.decode_seconds(1, 1000), step_time.decode_seconds(32, 32_000)
    assert 0.001 < one < many < 0.2
    prompt = step_time.seconds(Step.chunk(2048))
    assert 0.01 < prompt < 1.0
    assert step_time.seconds(Step.chunk(2048) + Step.decode(32, 32_000)) > max(prompt, many)


def test_the_hardware_that_must_be_there_is_there() -> None:
    names = " ".join(profiles.shipped())
    for hardware in ("h200-", "h100-", "a100-", "l40s-", "b200-", "rtxpro6000-", "rtx4090-"):
        assert hardware in names
    assert profiles.load("h200-llama-3.1-8b-fp8").file.regimes.decode.source is Source.MEASURED


def _set(*path_and_value: Any) -> Callable[[Raw], None]:
    *path, last, value = path_and_value

    def spoil(raw: Raw) -> None:
        inner: Any = raw
        for key in path:
            inner = inner[key]
        inner[last] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_set("format", 2), "format is 2; this version reads format 1"),
        (_set("modle", "x"), r"unknown key 'modle'; the nearest known one is 'model'"),
        (_set("limits", "kv_token", 5), r"'limits.kv_token'; the nearest known one is 'kv_tokens'"),
        (_set("coefficients", "per_sec_s", 5), "'coefficients.per_sec_s'; the nearest known one is 'per_seq_s'"),
        (_set("tables", "decode", "sequences", []), "'tables.decode.sequences'; the nearest known one is 'seqs'"),
        (_set("regimes", "decode", "sauce", 1), "'regimes.decode.sauce'; the nearest known one is 'source'"),
        (_set("coefficients", "c0_s", -1.0), "coefficients.c0_s"),
        (_set("limits", "kv_tokens", 0), "limits.kv_tokens"),
        (_set("regimes", "mixed", "source", "guessed"), "regimes.mixed.source"),
        (_set("tables", "tokens", "axis", 3, 1.0), r"tables.tokens: axis\[3\] is 1.0 after 24"),
        (_set("tables", "tokens", "seconds", 3, 0.001), r"tables.tokens: seconds\[3\]"),
        (_set("tables", "decode", "seqs", 4, 1.0), r"tables.decode: seqs\[4\]"),
        (_set("tables", "decode", "kv_tokens", 2, 0.0), r"tables.decode: kv_tokens\[2\]"),
        (_set("tables", "decode", "seconds", 5, 0, 1.0), r"tables.decode: seconds\[5\]\[1\]"),
        (_set("tables", "decode", "seconds", 5, []), r"tables.decode: seconds\[5\] has 0 values"),
        (_set("tables", "decode", "seconds", []), "tables.decode: seconds has 0 rows"),
        (_set("tables", "attention", "seconds", 0, 1e-9), "area 0"),
        (_set("name", "No Spaces"), "name"),
    ],
)
def test_spoilt_files_are_refused_with_the_place(spoil: Callable[[Raw], None], message: str) -> None:
    raw = _raw()
    spoil(raw)
    with pytest.raises(ProfileError, match=message) as refusal:
        parse(json.dumps(raw), "spoilt.json")
    assert str(refusal.value).startswith("spoilt.json: ")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "a JSON object"), ("{}", "format is None")]
)
def test_what_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        parse(text, "x")


def test_missing_values_are_named() -> None:
    raw = _raw()
    del raw["provenance"]["licence"]
    with pytest.raises(ProfileError, match=r"provenance.licence"):
        parse(json.dumps(raw), "x")


def test_loading_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(_raw()))
    assert profiles.load(path) == profiles.load(str(path)) == profiles.load("rtxpro6000-qwen3-32b-bf16")
    with pytest.raises(ProfileError, match=r"did you mean 'h100-llama-3.1-8b-bf16'"):
        profiles.load("h100-llama-3-8b-bf16")
    with pytest.raises(ProfileError, match="No such file"):
        profiles.load(tmp_path / "none.json")


def test_host_time_is_on_top_of_the_tables() -> None:
    raw = _raw()
    without = parse(json.dumps(raw), "x").step_time
    raw["coefficients"]["host_step_s"] += 0.002
    raw["coefficients"]["host_seq_s"] += 1e-4
    slower = parse(json.dumps(raw), "x").step_time
    assert slower.decode_seconds(40, 20_000) - without.decode_seconds(40, 20_000) == pytest.approx(0.006)
    assert slower.seconds(Step.chunk(500)) - without.seconds(Step.chunk(500)) == pytest.approx(0.002)


def test_a_prior_takes_what_a_probe_found() -> None:
    found = profiles.prior(profiles.Limits(kv_tokens=1_000_000, max_model_tokens=32_768))
    assert found.limits.kv_tokens == 1_000_000
    assert found.limits.max_model_tokens == 32_768
    assert found.limits.max_running_seqs is not None
    assert found.p90_error is None
    nothing = profiles.prior()
    assert nothing.limits.max_model_tokens is None  # guessing it would refuse good requests
    assert nothing.step_time.decode_seconds(8, 8000) > profiles.load(
        "h100-llama-3.1-8b-bf16"
    ).step_time.decode_seconds(8, 8000)
