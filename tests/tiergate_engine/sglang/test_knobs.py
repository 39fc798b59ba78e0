"""The SGLang plug-in, in a made-up stand-in for SGLang (`stand_in`): it was not run inside SGLang."""

from __future__ import annotations

import importlib
import logging
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.sglang_state import ServerInfo
from tests.tiergate_engine.sglang.stand_in import Scheduler, SetRequest, install, load_plugins
from tiergate_engine.sglang import register
from tiergate_engine.sglang.knobs import LiveKnobs
from tiergate_engine.sglang.versions import READ, STRICT_SWITCH

NAME, INTERVAL = "chunked_prefill_size", "prefill_decode_interval"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=[False, True])
def scheduler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    """A scheduler with the plug-in around it, of a late version and of one that always says yes."""
    made = install(monkeypatch, "0.5.23+cu129")
    load_plugins(register)
    return made(says_true=bool(request.param))


def put(scheduler: Scheduler, **settings: object) -> bool:
    return scheduler.set_internal_state(SetRequest(dict(settings))).updated


def told(scheduler: Scheduler) -> dict[str, object]:
    return scheduler.get_internal_state(None).internal_state


def test_nothing_changes_until_somebody_says_so(scheduler: Scheduler) -> None:
    assert scheduler.next_chunk(10_000) == 2048
    assert put(scheduler, pp_max_micro_batch_size=8)
    assert told(scheduler)["pp_max_micro_batch_size"] == 8
    assert scheduler.next_chunk(10_000) == 2048


def test_a_size_holds_from_the_next_batch_on(scheduler: Scheduler) -> None:
    assert put(scheduler, **{NAME: 256})
    assert scheduler.next_chunk(10_000) == 256
    assert put(scheduler, **{NAME: 2048})
    assert scheduler.next_chunk(10_000) == 2048


def test_the_adapter_reads_what_it_takes(scheduler: Scheduler) -> None:
    put(scheduler, **{NAME: 512})
    sizes = ServerInfo.read({"internal_states": [told(scheduler)]}).chunk
    assert sizes is not None
    assert (sizes.now, sizes.least, sizes.most, sizes.multiple) == (512, 16, 2048, 16)


@pytest.mark.parametrize("size", [0, -16, 8, 17, 2064, 10**9, 256.0, "256", True, None])
def test_what_it_does_not_take(scheduler: Scheduler, size: object) -> None:
    assert not put(scheduler, **{NAME: size})
    assert scheduler.chunked_prefill_size == 2048


def test_decodes_between_chunks(scheduler: Scheduler) -> None:
    assert put(scheduler, **{NAME: 256, INTERVAL: 2})
    assert (scheduler.chunked_prefill_size, scheduler.prefill_decode_interval) == (256, 2)
    assert told(scheduler)["tiergate"] == {
        "version": 1,
        "mixed": False,
        NAME: {"now": 256, "least": 16, "most": 2048, "multiple": 16},
        INTERVAL: {"now": 2, "launched": 0},
    }
    for size, interval in ((128, -1), (17, 1), (128, 10**6), (128, True), (128, None), (128, 1.0)):
        assert not put(scheduler, **{NAME: size, INTERVAL: interval})
        assert (scheduler.chunked_prefill_size, scheduler.prefill_decode_interval) == (256, 2)


def test_a_version_without_them(scheduler: Scheduler) -> None:
    scheduler.prefill_decode_interval = None
    assert INTERVAL not in str(told(scheduler))
    assert not put(scheduler, **{NAME: 256, INTERVAL: 1})
    assert put(scheduler, **{NAME: 256})


def test_all_settings_are_taken_or_none(scheduler: Scheduler) -> None:
    assert not put(scheduler, **{NAME: 17, "pp_max_micro_batch_size": 8})
    assert (scheduler.chunked_prefill_size, told(scheduler)["pp_max_micro_batch_size"]) == (2048, 64)
    assert put(scheduler, **{NAME: 64, "pp_max_micro_batch_size": 8})
    assert (scheduler.chunked_prefill_size, told(scheduler)["pp_max_micro_batch_size"]) == (64, 8)
    if not scheduler.says_true:  # what 0.5.12 itself refuses cannot be told from what it takes
        assert not put(scheduler, **{NAME: 128, "pp_max_micro_batch_size": 999})
        assert scheduler.chunked_prefill_size == 64


def test_a_request_is_left_as_it_came(scheduler: Scheduler) -> None:
    """Other ranks may be handed the same one."""
    request = SetRequest({NAME: 64, "pp_max_micro_batch_size": 8}, rid="r")
    scheduler.set_internal_state(request)
    assert request == SetRequest({NAME: 64, "pp_max_micro_batch_size": 8}, rid="r")


def test_the_launchs_own_size_comes_back_even_when_it_is_no_multiple(scheduler: Scheduler) -> None:
    scheduler.chunked_prefill_size = 1000
    assert "tiergate" in told(scheduler)
    assert put(scheduler, **{NAME: 992})
    assert put(scheduler, **{NAME: 1000})
    assert scheduler.chunked_prefill_size == 1000


@given(st.integers(1, 64), st.integers(1, 64) | st.none(), st.integers(1, 4096), st.integers(-10, 5000))
def test_no_size_is_taken_that_would_cut_a_prompt_to_nothing(
    page: int, align: int | None, launched: int, asked: int
) -> None:
    made = Scheduler(chunked_prefill_size=launched, page_size=page, truncation_align_size=align)
    answer = LiveKnobs(pytest.fail).around_set(Scheduler.set_internal_state, made, SetRequest({NAME: asked}))
    now = made.chunked_prefill_size
    assert now == (asked if answer.updated else launched)
    if answer.updated and asked != launched:
        assert asked < launched
        assert asked % page == asked % (align or 1) == 0
        assert asked >= max(page, align or 1)


@pytest.mark.parametrize(
    "made",
    [
        Scheduler(chunked_prefill_size=None),
        Scheduler(dynamic_chunk_sizer=object()),
        Scheduler(chunked_prefill_size=2048, truncation_align_size=4096),
    ],
)
def test_a_server_without_chunks_of_its_own_takes_none(made: Scheduler) -> None:
    chunk = LiveKnobs(pytest.fail)
    launched = made.chunked_prefill_size
    assert not chunk.around_set(Scheduler.set_internal_state, made, SetRequest({NAME: 1024})).updated
    assert "tiergate" not in chunk.after_get(made.get_internal_state(None), made).internal_state
    assert made.chunked_prefill_size == launched


def test_insides_that_are_not_as_expected_leave_it_as_it_is() -> None:
    class Other(Scheduler):
        @property
        def page_size(self) -> int:  # a version that has it no more
            raise AttributeError("page_size")

        @page_size.setter
        def page_size(self, value: int) -> None: ...

    said: list[str] = []
    chunk, made = LiveKnobs(said.append), Other()
    for _ in range(3):
        assert not chunk.around_set(Scheduler.set_internal_state, made, SetRequest({NAME: 64})).updated
        assert "tiergate" not in chunk.after_get(made.get_internal_state(None), made).internal_state
    assert chunk.around_set(Scheduler.set_internal_state, made, SetRequest({"pp_max_micro_batch_size": 3})).updated
    assert made.chunked_prefill_size == 2048
    assert len(said) == 1


def test_another_version_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made = install(monkeypatch, "0.9.0")
    with caplog.at_level(logging.WARNING):
        load_plugins(register)
    assert "0.9.0" in caplog.text
    assert not put(made(), **{NAME: 64})
    monkeypatch.setenv(STRICT_SWITCH, "1")
    with pytest.raises(SystemExit, match=r"0\.9\.0"):
        load_plugins(register)


@pytest.mark.parametrize("version", sorted(READ))
def test_versions_that_were_read(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv(STRICT_SWITCH, "1")
    made = install(monkeypatch, version)
    load_plugins(register)
    assert put(made(), **{NAME: 64})


@pytest.mark.parametrize("name", ["pyproject.toml", "engine/pyproject.toml"])
def test_sglang_finds_it(name: str) -> None:
    project = tomllib.loads((ROOT / name).read_text())["project"]
    module, _, function = project["entry-points"]["sglang.srt.plugins"]["tiergate"].partition(":")
    assert getattr(importlib.import_module(module), function) is register
