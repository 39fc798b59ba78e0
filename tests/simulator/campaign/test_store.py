"""The store: what comes back is what was put, and nothing else ever comes back."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from simulator.campaign.address import Addresser
from simulator.campaign.store import Store, StoreWarning, UnstorableOutcome
from simulator.outcome import Timing
from tests.simulator.campaign.fakes import cell, outcome

ADDRESS = Addresser("code").address(cell())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cells")


def test_an_outcome_comes_back_as_it_was(store: Store) -> None:
    store.put(ADDRESS, cell(), outcome(0.93))
    assert store.get(ADDRESS) == outcome(0.93)
    assert store.get(ADDRESS, cell()) == outcome(0.93)


def test_nothing_stored_is_nothing(store: Store) -> None:
    assert store.get(ADDRESS) is None
    assert not list(store.stored())


def test_the_same_outcome_gives_the_same_bytes_whatever_it_took(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    store.put(ADDRESS, cell(10), outcome(0.93))
    other.put(ADDRESS, cell(10.0), replace(outcome(0.93), timing=Timing(99.0, None, None)))
    assert store.path(ADDRESS).read_bytes() == other.path(ADDRESS).read_bytes()
    assert other.get(ADDRESS) != outcome(0.93)  # the timing does differ


def test_all_results_are_listed_with_their_cells(store: Store) -> None:
    cells = {Addresser("code").address(cell(seed=seed)): cell(seed=seed) for seed in range(5)}
    for address, one in cells.items():
        store.put(address, one, outcome(0.9))
    assert {stored.address: stored.cell for stored in store.stored()} == cells


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" + data,
        lambda data: b"{}",
        lambda data: data.replace(b'"format":1', b'"format":99'),
        lambda data: data.replace(b'"offered":1000', b'"offered":1001'),
        lambda data: data.replace(b"9.5", b"9.6"),
        lambda data: data.replace(ADDRESS.encode(), b"0" * 32),
    ],
)
def test_a_damaged_file_is_told_and_not_used(store: Store, damage: object) -> None:
    assert callable(damage)
    store.put(ADDRESS, cell(), outcome(0.93))
    data = store.path(ADDRESS).read_bytes()
    assert damage(data) != data
    store.path(ADDRESS).write_bytes(damage(data))
    with pytest.warns(StoreWarning, match=ADDRESS):
        assert store.get(ADDRESS) is None
    with pytest.warns(StoreWarning):
        assert not list(store.stored())
    store.put(ADDRESS, cell(), outcome(0.93))
    assert store.get(ADDRESS) == outcome(0.93)


def test_the_result_of_another_cell_is_not_used(store: Store) -> None:
    store.put(ADDRESS, cell(seed=2), outcome(0.93))
    with pytest.warns(StoreWarning, match="another cell"):
        assert store.get(ADDRESS, cell()) is None


def test_a_damaged_timing_costs_only_the_timing(store: Store) -> None:
    store.put(ADDRESS, cell(), outcome(0.93))
    store.path(ADDRESS).with_name(f"{ADDRESS}.timing.json").write_text("?")
    assert store.get(ADDRESS) == replace(outcome(0.93), timing=None)


def test_other_files_in_the_folder_are_left_alone(store: Store) -> None:
    store.put(ADDRESS, cell(), outcome(0.93))
    (store.folder / "notes.json").write_text("mine")
    unfinished = store.path(ADDRESS).with_name(f".{ADDRESS}.json.123.tmp")
    unfinished.write_text("half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(store.stored())) == 1
    store.remove_unfinished(124)
    assert unfinished.exists()
    store.remove_unfinished(123)
    assert not unfinished.exists()


def test_a_result_from_before_a_field_was_added_is_still_listed(store: Store) -> None:
    """Its address is another one, because the code is; but what was found stays readable."""
    store.put(ADDRESS, cell(), outcome(0.93))
    path = store.path(ADDRESS)
    content = orjson.loads(path.read_bytes())
    del content["body"]["cell"]["workload"]["invert_at"]
    body = orjson.dumps(content["body"], option=orjson.OPT_SORT_KEYS)
    content["digest"] = hashlib.sha256(body).hexdigest()
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    assert store.get(ADDRESS, cell()) == outcome(0.93)


def test_numbers_that_are_not_finite_are_refused(store: Store) -> None:
    with pytest.raises(UnstorableOutcome, match=ADDRESS):
        store.put(ADDRESS, cell(), replace(outcome(0.93), window_s=float("nan")))
    assert store.get(ADDRESS) is None
