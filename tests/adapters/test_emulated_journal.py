"""The emulated engine's journal: every sequence and what became of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.emulated.journal import Fate, Journal, read_journal
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime


def test_what_was_noted_is_read_back_and_a_line_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.note(Fate.SUBMITTED, "chatcmpl-load-7-0-0-0000000a", 0, 1)
    journal.note(Fate.FINISHED, "chatcmpl-load-7-0-0-0000000a", 12, 0)
    journal.close()
    with path.open("ab") as file:
        file.write(b'[1.0,"abor')
    first, second = read_journal(path)
    assert (first.fate, first.request_id, first.open_sequences) == (Fate.SUBMITTED, "load-7", 1)
    assert (second.fate, second.tokens, second.open_sequences) == (Fate.FINISHED, 12, 0)
    assert first.at_s <= second.at_s


async def test_an_engine_notes_who_finished_and_who_left(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    settings = EmulatedSettings("m", EngineConfig(kv_tokens=10_000, max_model_tokens=5_000))
    engine = EmulatedEngine(settings, RooflineStepTime(c0_s=0.002), journal)
    body = {"model": "m", "prompt": "two words", "ignore_eos": True, "stream": True}
    async with serving([engine]) as (served,), aiohttp.ClientSession(served.url) as http:
        async with http.post(
            "/v1/completions", json={**body, "max_tokens": 3}, headers={"x-request-id": "whole"}
        ) as answer:
            await answer.read()
        async with http.post(
            "/v1/completions", json={**body, "max_tokens": 4_000}, headers={"x-request-id": "gone"}
        ) as answer:
            await answer.content.readany()
            answer.close()
        await engine.driver.drained()
    journal.close()
    entries = await asyncio.to_thread(lambda: list(read_journal(path)))
    assert [(one.request_id, one.fate) for one in entries] == [
        ("whole", Fate.SUBMITTED),
        ("whole", Fate.FINISHED),
        ("gone", Fate.SUBMITTED),
        ("gone", Fate.ABORTED),
    ]
    assert [one.open_sequences for one in entries] == [1, 0, 1, 0]
    assert entries[1].tokens == 3
    assert 0 < entries[3].tokens < 4_000
