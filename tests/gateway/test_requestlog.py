"""The request log: what it tells of every end, where it writes, and what becomes of lines that find no place."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from gateway import requestlog
from gateway.requestlog import LogFile, RequestLine, RequestLog, unwritable
from scheduling.tiers import Slo
from tests.gateway.rig import Client, Engine, client, engine, gateway, settings_for, settled, until
from workloads.traces import Trace, load_trace

_TIERS = [
    {"name": "fast", "ttft_ms": 5_000, "tpot_ms": 50},
    {"name": "chat", "ttft_ms": 20_000, "tpot_ms": 100},
    {"name": "batch", "on_miss": "relegate"},
]


def line(**more: object) -> RequestLine:
    values: dict[str, object] = {
        "request_id": "a",
        "tenant": "t",
        "model": "m",
        "tier": "chat",
        "backend": "e0",
        "decision": "own_tier",
        "reason": None,
        "end": "finished",
        "attained": True,
        "streamed": True,
        "slo_stated": False,
        "promised_ttft_s": 2.0,
        "promised_tpot_s": 0.05,
        "sequences": 1,
        "prompt_tokens": 10,
        "cached_tokens": None,
        "output_tokens": 5,
        "merged": False,
        "seconds": 1.0,
        "ttft_s": 0.5,
        "tpot_s": 0.1,
        "time": 1_000.0,
    }
    return RequestLine(**(values | more))  # type: ignore[arg-type]  # a dict's values have no types of their own


async def _leave(ask: Client, one: Engine) -> None:
    """Ask for a stream and go away in the middle of it."""
    async with ask.chat("first_then_wait", headers={"x-request-id": "left", "x-slo-tier": "batch"}) as answer:
        await answer.content.readany()
        await until(lambda: one.streams > 0)


async def _logged(path: Path) -> list[dict[str, object]]:
    """Every kind of end, one request each, and the lines about them."""
    file = LogFile(path)
    async with (
        engine() as one,
        gateway(settings_for(one, tiers=_TIERS, default_tier="chat"), write_log=file.write) as made,
        client(made) as ask,
    ):
        await ask.read_chat(headers={"x-request-id": "good", "x-slo-tier": "fast"}, user="secret words")
        await ask.read_chat(stream=False, headers={"x-request-id": "whole"})
        await ask.read_chat("error_later", headers={"x-request-id": "broken", "x-slo-ttft-ms": "1500"})
        await ask.read_chat("overload", headers={"x-request-id": "overload"})
        await _leave(ask, one)
        await settled(made)
    file.close()
    logged = await asyncio.to_thread(path.read_bytes)
    return [orjson.loads(text) for text in logged.splitlines()]


async def test_every_end_is_told(tmp_path: Path) -> None:
    lines = {told["request_id"]: told for told in await _logged(tmp_path / "log.jsonl")}
    assert {name: told["end"] for name, told in lines.items()} == {
        "good": "finished",
        "whole": "finished",
        "broken": "failed",
        "overload": "refused",
        "left": "cancelled",
    }
    good = lines["good"]
    assert good["tier"] == "fast"
    assert (good["promised_ttft_s"], good["promised_tpot_s"], good["slo_stated"]) == (5.0, 0.05, True)
    assert (good["prompt_tokens"], good["output_tokens"], good["sequences"]) == (11, 3, 1)
    assert (good["attained"], good["reason"], good["backend"]) == (True, None, "e0")
    assert isinstance(good["ttft_s"], float)
    assert isinstance(good["seconds"], float)
    assert 0 < good["ttft_s"] <= good["seconds"]
    assert (lines["broken"]["promised_ttft_s"], lines["broken"]["promised_tpot_s"]) == (1.5, 0.1)
    assert lines["overload"]["reason"] == "upstream_failed"
    assert (lines["left"]["promised_ttft_s"], lines["left"]["attained"]) == (None, None)
    assert lines["whole"]["ttft_s"] is None


async def test_no_text_of_a_request_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    await _logged(path)
    text = path.read_bytes()
    assert text.count(b"\n") == 5
    for word in (b"hello", b"there", b"secret", b"words"):
        assert word not in text


async def test_the_log_reads_as_a_trace(tmp_path: Path) -> None:
    """Refused and broken requests are demand too; their answers are as long as another's of their tier."""
    path = tmp_path / "log.jsonl"
    lines = await _logged(path)
    trace = load_trace(path)
    by_tier = _by_tier(trace)
    assert {tier: len(found) for tier, found in by_tier.items()} == {"fast": 1, "chat": 3, "batch": 1}
    assert by_tier["fast"] == [(Slo(5.0, 0.05), 11, 3)]
    assert min(by_tier["chat"], key=str) == (Slo(1.5, 0.1), lines[2]["prompt_tokens"], 3)
    assert by_tier["batch"][0][0] == Slo(None, None)
    assert trace.guessed == 2
    assert {item.model for item in trace.requests} == {"test-model"}
    assert 0 < trace.duration_s < 60


def _by_tier(trace: Trace) -> dict[str, list[tuple[Slo, int, int]]]:
    found: dict[str, list[tuple[Slo, int, int]]] = {}
    for item in trace.requests:
        assert item.tier is not None
        assert item.slo is not None
        found.setdefault(item.tier, []).append((item.slo, item.prompt_tokens, item.output_tokens))
    return found


async def test_parallel_answers_and_cached_tokens_are_told() -> None:
    lines: list[bytes] = []
    async with engine() as one, gateway(settings_for(one), write_log=lines.append) as made, client(made) as ask:
        one.usage_event = one.usage_event.replace(
            b'"total_tokens":14', b'"total_tokens":14,"prompt_tokens_details":{"cached_tokens":8}'
        )
        await ask.read_chat(n=2, headers={"x-request-id": "two"})
        await settled(made)
        await asyncio.to_thread(made.log.flush)
    (told,) = map(orjson.loads, b"".join(lines).splitlines())
    assert (told["sequences"], told["cached_tokens"], told["output_tokens"]) == (2, 8, 3)


# --- the file --------------------------------------------------------------------------------------------------


def test_a_file_that_was_moved_away_is_followed_when_told(tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "log.1"
    path.write_bytes(b"before\n")
    file = LogFile(path)
    file.write(b"one\n")
    path.rename(moved)
    file.write(b"two\n")
    file.reopen()
    file.write(b"three\n")
    file.close()
    assert moved.read_bytes() == b"before\none\ntwo\n"
    assert path.read_bytes() == b"three\n"


def test_a_file_that_cannot_be_opened_again_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = LogFile(folder / "log")
    folder.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        file.reopen()
    file.write(b"one\n")
    file.close()
    assert (tmp_path / "gone" / "log").read_bytes() == b"one\n"


def test_lines_after_a_torn_one_begin_anew(tmp_path: Path) -> None:
    class Torn:
        """A file that takes three bytes and then has no room."""

        def __init__(self) -> None:
            self.taken = b""
            self.room = 3

        def write(self, data: memoryview) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            count = min(self.room, len(data))
            self.room -= count
            self.taken += bytes(data[:count])
            return count

    file, disk = LogFile(tmp_path / "log"), Torn()
    file.close()
    file._file = disk  # type: ignore[assignment]  # a disk that is full at a byte of our choosing
    with pytest.raises(OSError, match="No space left"):
        file.write(b"one\ntwo\n")
    disk.room = 100
    file.write(b"three\n")
    file.write(b"four\n")
    assert disk.taken == b"one\nthree\nfour\n"


def test_what_stands_against_a_path_is_named(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "log") is None
    assert unwritable(tmp_path) == "is a folder"
    assert unwritable(tmp_path / "nowhere" / "log") == f"the folder {tmp_path / 'nowhere'} is not there"
    assert not (tmp_path / "log").exists()


# --- lines that find no place ----------------------------------------------------------------------------------


def test_a_full_queue_loses_lines_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requestlog, "_MOST_LINES", 3)
    written: list[bytes] = []
    lost: list[int] = []
    log = RequestLog(written.append, lost.append)
    for _ in range(5):
        log.add(line())
    log.flush()
    log.add(line())
    log.flush()
    assert sum(lost) == 2
    assert [text.count(b"\n") for text in written] == [3, 1]


def test_a_sink_that_fails_loses_its_lines_once_told(caplog: pytest.LogCaptureFixture) -> None:
    """The gateway goes on, says so once, and writes again when the sink is back."""
    works = [False, False, True, False]
    written: list[bytes] = []
    lost: list[int] = []

    def sink(lines: bytes) -> None:
        if not works.pop(0):
            raise OSError(28, "No space left on device")
        written.append(lines)

    log = RequestLog(sink, lost.append)
    for count in (2, 1, 4, 3):
        for _ in range(count):
            log.add(line())
        log.flush()
    assert sum(lost) == 2 + 1 + 3
    assert [text.count(b"\n") for text in written] == [4]
    assert [record.message.count("No space left") for record in caplog.records] == [1, 1]


async def test_a_failing_sink_is_counted_in_the_metrics() -> None:
    def sink(_lines: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with engine() as one, gateway(settings_for(one), write_log=sink) as made, client(made) as ask:
        for _ in range(3):
            status, _ = await ask.read_chat()
            assert status == 200
        await until(lambda: made.telemetry.lost_log_lines == 3)
        async with ask.session.get(f"{ask.base}/metrics") as answer:
            assert "tiergate_request_log_lost_lines_total 3.0" in await answer.text()


async def test_lines_added_while_others_are_written_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requestlog, "_EVERY_S", 0.001)
    written: list[bytes] = []
    made: Sequence[RequestLine] = [line(request_id=str(index)) for index in range(1_000)]
    log = RequestLog(written.append)
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(log.run())
        for number, one in enumerate(made):
            log.add(one)
            if number % 10 == 0:
                await asyncio.sleep(0.001)
        writing.cancel()
    await asyncio.to_thread(log.flush)
    told = [orjson.loads(text)["request_id"] for text in b"".join(written).splitlines()]
    assert len(written) > 1
    assert told == [one.request_id for one in made]
