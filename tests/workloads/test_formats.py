"""A trace written in any native format reads back as it was; Tiergate's own log keeps tiers and promises."""

from __future__ import annotations

import csv
import gzip
import io
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.tiers import Slo
from workloads.traces import Trace, TraceError, TraceRequest, load_trace

_START = datetime(2024, 5, 10, 23, 59, tzinfo=UTC)


def _csv(header: str, rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header.split(","))
    writer.writerows(rows)
    return text.getvalue()


def _ours(requests: Sequence[TraceRequest]) -> str:
    return _csv(
        "arrival_s,prompt_tokens,output_tokens,client,prefix_blocks",
        (
            (
                one.arrival_s,
                one.prompt_tokens,
                one.output_tokens,
                one.client,
                " ".join(map(str, one.prefix_blocks)),
            )
            for one in requests
        ),
    )


def _azure_2023(requests: Sequence[TraceRequest]) -> str:
    """Seven digits of a second, no zone."""
    return _csv(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        ((f"{_at(one):%Y-%m-%d %H:%M:%S.%f}0", one.prompt_tokens, one.output_tokens) for one in requests),
    )


def _azure_2024(requests: Sequence[TraceRequest]) -> str:
    return _csv(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        ((_at(one).isoformat(sep=" "), one.prompt_tokens, one.output_tokens) for one in requests),
    )


def _at(one: TraceRequest) -> datetime:
    return _START + timedelta(seconds=one.arrival_s)


def _burstgpt(requests: Sequence[TraceRequest]) -> str:
    return _csv(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        (
            (one.arrival_s, one.client, 1.5, "ChatGPT", one.prompt_tokens, one.output_tokens, 0, "API log")
            for one in requests
        ),
    )


def _json(lines: Iterable[dict[str, object]]) -> str:
    return "".join(orjson.dumps(line).decode() + "\n" for line in lines)


def _mooncake(requests: Sequence[TraceRequest]) -> str:
    return _json(
        {
            "timestamp": round(one.arrival_s * 1e3),
            "input_length": one.prompt_tokens,
            "output_length": one.output_tokens,
            "hash_ids": list(one.prefix_blocks),
        }
        for one in requests
    )


def _bailian(requests: Sequence[TraceRequest]) -> str:
    return _json(
        {
            "chat_id": int(one.client or 0),
            "parent_chat_id": -1,
            "timestamp": one.arrival_s,
            "input_length": one.prompt_tokens,
            "output_length": one.output_tokens,
            "type": "text",
            "turn": 1,
            "hash_ids": list(one.prefix_blocks),
        }
        for one in requests
    )


WRITERS: dict[str, tuple[Callable[[Sequence[TraceRequest]], str], frozenset[str], int | None]] = {
    # What writes it, what it can carry beside times and lengths, and its blocks.
    "ours": (_ours, frozenset({"client", "blocks"}), 512),
    "azure 2023": (_azure_2023, frozenset(), None),
    "azure 2024": (_azure_2024, frozenset(), None),
    "burstgpt": (_burstgpt, frozenset({"client"}), None),
    "mooncake": (_mooncake, frozenset({"blocks"}), 512),
    "bailian": (_bailian, frozenset({"client", "blocks"}), 16),
}

_requests = st.lists(
    st.builds(
        TraceRequest,
        st.integers(0, 10**7).map(lambda ms: ms / 1e3),
        st.integers(1, 200_000),
        st.integers(1, 9_000),
        st.integers(0, 50).map(str),
        st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=20,
)


def read(text: str, name: str = "t.csv") -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return load_trace(path)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=30, deadline=None)
@given(requests=_requests, packed=st.booleans())
def test_a_trace_reads_back_as_it_was_written(name: str, requests: list[TraceRequest], packed: bool) -> None:
    write, carries, block_tokens = WRITERS[name]
    trace = read(write(requests), "t.gz" if packed else "t")
    ordered = sorted(requests, key=lambda one: one.arrival_s)
    start_s = ordered[0].arrival_s
    assert [one.arrival_s for one in trace.requests] == pytest.approx(
        [one.arrival_s - start_s for one in ordered], abs=2e-6
    )
    for field in ("prompt_tokens", "output_tokens"):
        assert [getattr(one, field) for one in trace.requests] == [getattr(one, field) for one in ordered]
    assert [one.client for one in trace.requests] == [
        one.client if "client" in carries else None for one in ordered
    ]
    assert [one.prefix_blocks for one in trace.requests] == [
        one.prefix_blocks if "blocks" in carries else () for one in ordered
    ]
    has_blocks = "blocks" in carries and any(one.prefix_blocks for one in requests)
    assert trace.block_tokens == (block_tokens if has_blocks else None)
    assert {(one.tier, one.slo) for one in trace.requests} == {(None, None)}


def test_lengths_alone_are_a_trace_without_arrivals() -> None:
    trace = read("prompt_tokens,output_tokens\n10,2\n20,3\n")
    assert [(one.prompt_tokens, one.output_tokens) for one in trace.requests] == [(10, 2), (20, 3)]
    assert (trace.duration_s, trace.rate_rps, trace.tick_s) == (0.0, 0.0, None)


# --- Tiergate's own log ----------------------------------------------------------------------------------------


def told(
    arrival_s: float, tier: str, output_tokens: int, end: str = "finished", **more: object
) -> dict[str, object]:
    return {
        "request_id": f"r{arrival_s}",
        "tenant": "t",
        "model": "m",
        "tier": tier,
        "end": end,
        "promised_ttft_s": 1.0,
        "promised_tpot_s": 0.05,
        "sequences": 1,
        "prompt_tokens": 100,
        "output_tokens": output_tokens,
        "seconds": 2.5,
        "time": 1.7e9 + arrival_s + 2.5,
    } | more


def test_lines_are_put_in_order_of_arrival() -> None:
    """They are written in order of their ends."""
    trace = read(_json([told(5.0, "chat", 7), told(1.0, "fast", 9, promised_ttft_s=0.2, promised_tpot_s=None)]))
    assert [(one.arrival_s, one.tier, one.output_tokens, one.slo) for one in trace.requests] == [
        (0.0, "fast", 9, Slo(0.2, None)),
        (4.0, "chat", 7, Slo(1.0, 0.05)),
    ]
    assert {(one.client, one.model) for one in trace.requests} == {("t", "m")}
    assert trace.guessed == 0


def test_refused_requests_are_demand_with_answers_as_long_as_their_tiers() -> None:
    lines = [told(float(at), "chat", 100 + at) for at in range(40)]
    lines += [told(float(at), "fast", 5) for at in range(3)]
    lines += [told(100.0 + at, "chat", 0, "refused") for at in range(200)]
    lines += [told(400.0, "fast", 1, "failed"), told(401.0, "batch", 0, "refused")]
    lines += [told(402.0, "chat", 3, "cancelled")]
    trace = read(_json(lines))
    assert trace.guessed == 202
    assert len(trace.requests) == 40 + 3 + 200 + 2 + 1
    refused = [one.output_tokens for one in trace.requests if 100 <= one.arrival_s < 400]
    assert {*refused} <= {*range(100, 140), 3}
    assert statistics.mean(refused) == pytest.approx(117, abs=8)
    last = {one.arrival_s: (one.tier, one.output_tokens) for one in trace.requests if one.arrival_s >= 400}
    assert last[400.0] == ("fast", 5)
    assert last[401.0][0] == "batch"
    assert last[402.0] == ("chat", 3)
    assert trace == read(_json(lines))


def test_parallel_answers_are_requests_of_their_own() -> None:
    trace = read(_json([told(0.0, "chat", 31, sequences=3), told(1.0, "chat", 10)]))
    assert [(one.arrival_s, one.output_tokens) for one in trace.requests] == [(0.0, 11)] * 3 + [(1.0, 10)]


def test_a_last_line_that_is_still_being_written_is_left_out() -> None:
    whole = _json([told(0.0, "chat", 3), told(1.0, "chat", 4)])
    assert len(read(whole + '{"request_id": "r2", "en').requests) == 2
    with pytest.raises(TraceError, match="line 3: not JSON"):
        read(whole + '{"request_id": "r2", "en\n' + whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"promised_ttft_s": -1.0}, "line 1: promised_ttft_s, promised_tpot_s are no promise: ttft_s must be"),
        ({"promised_tpot_s": "soon"}, "line 1: promised_tpot_s must be a number"),
        ({"seconds": None}, "line 1: seconds is missing"),
        ({"time": "noon"}, "line 1: time must be a number"),
        ({"output_tokens": 1.5}, "line 1: output_tokens must be a count"),
        ({"sequences": "x"}, "line 1: sequences must be a number"),
        ({"prompt_tokens": 0}, "no usable request in it .1 had no prompt"),
        ({"end": "refused", "output_tokens": 0}, "no usable request in it .1 had no prompt or no answer"),
    ],
)
def test_a_bad_line_of_the_log_is_named(more: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read(_json([told(0.0, "chat", 3) | more]))
