"""Loaders: every native format, and errors that name file, line and field."""

from __future__ import annotations

import gzip
import random
import statistics
from pathlib import Path

import pytest

from workloads.traces import (
    Trace,
    TraceError,
    TraceRequest,
    limit_lengths,
    load_trace,
    named_trace,
    scale_rate,
    shipped,
    shipped_trace,
    spread_ticks,
    time_window,
)


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


FORMATS = {
    "ours, blocks as ranges": "arrival_s,prompt_tokens,output_tokens,client,prefix_blocks\n"
    "5.0,10,2,a,0-1\n6.5,20,3,,\n",
    "ours": "arrival_s,prompt_tokens,output_tokens,client,prefix_blocks\n5.0,10,2,a,0 1\n6.5,20,3,,\n",
    "azure 2023": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,10,2\n2023-11-16 18:17:05.4799600,20,3\n",
    "azure 2024": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,10,2\n2024-05-10 00:00:01.509930+00:00,20,3\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,10,2,12,Conversation log\n6.5,GPT-4,20,3,23,API log\n",
    "burstgpt with sessions": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,"
    "Total tokens,Log Type\n5,s1,1.0,ChatGPT,10,2,12,Conversation log\n6.5,,,GPT-4,20,3,23,API log\n",
    "mooncake": '{"timestamp": 5000, "input_length": 10, "output_length": 2, "hash_ids": [0, 1]}\n\n'
    '{"timestamp": 6500, "input_length": 20, "output_length": 3, "hash_ids": []}\n',
    "bailian": '{"chat_id": 7, "parent_chat_id": -1, "timestamp": 5.0, "input_length": 10, "output_length": 2, '
    '"type": "text", "turn": 1, "hash_ids": [0, 1]}\n'
    '{"chat_id": 8, "parent_chat_id": 7, "timestamp": 6.5, "input_length": 20, "output_length": 3, '
    '"type": "text", "turn": 2, "hash_ids": []}\n',
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_native_formats_read_the_same(tmp_path: Path, name: str, suffix: str) -> None:
    trace = load_trace(write(tmp_path, FORMATS[name], "trace" + suffix))
    assert [(item.arrival_s, item.prompt_tokens, item.output_tokens) for item in trace.requests] == [
        (0.0, 10, 2),
        (1.5, 20, 3),
    ]
    kind = name.partition(",")[0]
    if kind in {"ours", "mooncake", "bailian"}:
        assert trace.requests[0].prefix_blocks == (0, 1)
        assert trace.block_tokens == (16 if kind == "bailian" else 512)
    else:
        assert trace.block_tokens is None
    assert trace.requests[0].client == {"ours": "a", "burstgpt with sessions": "s1", "bailian": "7"}.get(kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"line 1: unknown trace format with columns \['a', 'b'\]"),
        ("", "line 1: unknown trace format"),
        (
            "arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n",
            "line 3: prompt_tokens must be a number",
        ),
        ("arrival_s,prompt_tokens,output_tokens\nnan,1,1\n", "line 2: arrival_s must be a number, not 'nan'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,-1,1\n", "line 2: prompt_tokens must be a count of tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1.5,1\n", "line 2: prompt_tokens must be a count of tokens"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1\n", "line 2: output_tokens is missing"),
        (
            "arrival_s,prompt_tokens,output_tokens,prefix_blocks\n0,1,1,a b\n",
            "line 2: prefix_blocks must be",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n",
            "line 2: TIMESTAMP must be a date",
        ),
        ('{"timestamp": 1, "input_length": 1}\n', "line 1: unknown trace format with fields"),
        ('{"timestamp": 1, "input_length": 1, "output_length": null}\n', "line 1: output_length is missing"),
        ('{"timestamp": 1, "input_length": true, "output_length": 1}\n', "line 1: input_length must be a number"),
        ("prompt_tokens,output_tokens,prefix_blocks\n1,1,0-x\n", "line 2: prefix_blocks must be a list"),
        ("prompt_tokens,output_tokens,prefix_blocks\n1,1,0-999999999\n", "line 2: prefix_blocks must be a list"),
        ('{"a": 1}\n', "line 1: unknown trace format with fields"),
        (
            '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 3}\n',
            "line 1: hash_ids must be",
        ),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"tim\n', "line 2: not JSON"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[]\n', "line 2: must be a JSON object"),
        ("arrival_s,prompt_tokens,output_tokens\n0,0,1\n0,1,0\n", "no usable request in it .2 had no prompt"),
    ],
)
def test_errors_name_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TraceError, match=message) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


def test_a_broken_gzip_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(FORMATS["ours"].encode())[:-20])
    with pytest.raises(TraceError, match=r"t\.csv\.gz: not a readable text file"):
        load_trace(path)


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(FORMATS["ours"].encode() * 50))
    packed[20:40] = bytes(20)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(packed)
    with pytest.raises(TraceError, match="not a readable text file"):
        load_trace(path)


def test_failed_rows_are_counted_and_rows_sorted(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n3,1,1\n1,2,2\n2,3,0\n"))
    assert trace.dropped == 1
    assert [(item.arrival_s, item.prompt_tokens) for item in trace.requests] == [(0.0, 2), (2.0, 1)]


def test_limit_reads_the_beginning(tmp_path: Path) -> None:
    assert len(load_trace(write(tmp_path, FORMATS["ours"]), limit=1).requests) == 1


@pytest.mark.parametrize(
    ("name", "rows", "prompt_tokens"), [("azure2023_conv", 19366, 374), ("azure2023_code", 8819, 4808)]
)
def test_shipped_traces_are_whole(name: str, rows: int, prompt_tokens: int) -> None:
    trace = shipped_trace(name)
    assert len(trace.requests) == rows
    assert trace.requests[0].prompt_tokens == prompt_tokens
    assert trace.tick_s is None
    assert 3400 < trace.duration_s < 3600


def test_every_shipped_trace_reads_whole() -> None:
    """Rows, and whether it has prefix blocks and arrivals."""
    traces = [shipped_trace(name) for name in shipped()]
    assert {trace.name.removesuffix(".csv.gz"): len(trace.requests) for trace in traces} == {
        "arxiv_summarization": 28_257,
        "azure2023_code": 8_819,
        "azure2023_conv": 19_366,
        "mooncake_conversation": 12_031,
        "servegen_deepseekr1": 20_000,
        "sharegpt_llama31_8b": 300,
    }
    assert all(trace.dropped == trace.guessed == 0 for trace in traces)
    assert [trace.name.split("_")[0] for trace in traces if trace.block_tokens == 512] == ["mooncake"]
    assert [trace.name.split("_")[0] for trace in traces if not trace.duration_s] == ["arxiv"]
    assert [trace.name.split("_")[0] for trace in traces if trace.tick_s == 3.0] == ["mooncake"]


def test_mooncake_keeps_its_shared_prefixes() -> None:
    """Every prompt has a block for each 512 tokens of it, the last one begun; many are shared."""
    trace = shipped_trace("mooncake_conversation")
    assert all(len(item.prefix_blocks) == -(-item.prompt_tokens // 512) for item in trace.requests)
    blocks = [block for item in trace.requests for block in item.prefix_blocks]
    assert (len(blocks), len(set(blocks))) == (288_500, 182_790)


def test_a_trace_is_found_by_any_name(tmp_path: Path) -> None:
    assert named_trace("sharegpt_llama31_8b") == shipped_trace("sharegpt_llama31_8b")
    path = write(tmp_path, FORMATS["ours"])
    assert named_trace(str(path)) == load_trace(path)
    for name in ("nope", str(tmp_path)):
        with pytest.raises(TraceError, match=r"it is a file, uniform:.*azure2023_code"):
            named_trace(name)


def test_uniform_lengths_stay_in_their_bounds() -> None:
    trace = named_trace("uniform:64-4096/16-1024")
    prompts = [item.prompt_tokens for item in trace.requests]
    outputs = [item.output_tokens for item in trace.requests]
    for tokens, low, high in ((prompts, 64, 4096), (outputs, 16, 1024)):
        assert low <= min(tokens) < 1.1 * low
        assert 0.99 * high < max(tokens) <= high
        assert statistics.mean(tokens) == pytest.approx((low + high) / 2, rel=0.03)
    assert trace == named_trace("uniform:64-4096/16-1024")
    assert trace.duration_s == 0.0


@pytest.mark.parametrize(
    "name", ["uniform:", "uniform:1-2", "uniform:5-2/1-2", "uniform:0-2/1-2", "uniform:1-2/1-x"]
)
def test_a_uniform_trace_with_bad_bounds_is_refused(name: str) -> None:
    with pytest.raises(TraceError, match="must read uniform:LOW-HIGH/LOW-HIGH"):
        named_trace(name)


def test_an_unknown_shipped_trace_is_named() -> None:
    with pytest.raises(TraceError, match="no shipped trace is called 'nope'"):
        shipped_trace("nope")


def test_ticks_are_found_and_spread_inside_themselves(tmp_path: Path) -> None:
    line = '{{"timestamp": {0}, "input_length": 5, "output_length": 5}}\n'
    trace = load_trace(write(tmp_path, "".join(line.format(3000 * tick) * 8 for tick in range(20))))
    assert trace.tick_s == pytest.approx(3.0)
    spread = spread_ticks(trace, random.Random(1))
    assert spread.tick_s is None
    times = [item.arrival_s for item in spread.requests]
    assert times == sorted(times)
    assert [sum(3 * tick <= time < 3 * tick + 3 for time in times) for tick in range(20)] == [8] * 20
    assert len(set(times)) == 160
    assert spread == spread_ticks(trace, random.Random(1))


def test_a_fine_clock_is_left_alone() -> None:
    trace = shipped_trace("azure2023_conv")
    assert spread_ticks(trace, random.Random(1)) is trace


SMALL = Trace("small", tuple(TraceRequest(float(second), 100 * second + 1, second + 1) for second in range(10)))


def test_a_window_is_half_open_and_moved_to_zero() -> None:
    cut = time_window(SMALL, 2.0, 3.0)
    assert [(item.arrival_s, item.output_tokens) for item in cut.requests] == [(0.0, 3), (1.0, 4), (2.0, 5)]
    with pytest.raises(TraceError, match="nothing arrives"):
        time_window(SMALL, 20.0, 1.0)


def test_scaling_keeps_the_shape() -> None:
    fast = scale_rate(SMALL, 4.0)
    assert fast.rate_rps == pytest.approx(4 * SMALL.rate_rps)
    assert [item.arrival_s for item in fast.requests] == [second / 4 for second in range(10)]
    with pytest.raises(ValueError, match="rate factor"):
        scale_rate(SMALL, 0.0)


def test_lengths_are_cut_not_dropped() -> None:
    cut = limit_lengths(SMALL, max_prompt_tokens=250, max_output_tokens=4)
    assert len(cut.requests) == 10
    assert max(item.prompt_tokens for item in cut.requests) == 250
    assert max(item.output_tokens for item in cut.requests) == 4
    assert limit_lengths(SMALL) == SMALL
