"""The scanner: bytes unchanged under any cut, and the right count."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import Api, SseScanner, StreamTooWide, Usage, read_usage

_TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'
_SPACED = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}}]}\n\n'
_ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
_TOOL = b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":""}}]}}]}\n\n'
_THINK = b'data: {"choices":[{"delta":{"reasoning_content":"hm"}}]}\n\n'
_QUOTED = b'data: {"choices":[{"delta":{"role":"\\"content\\":\\"x"}}]}\n\n'
_COMMENT = b": ping\n\n"
_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
_STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
_DONE = b"data: [DONE]\n\n"
_EVENTS = (_TOKEN, _SPACED, _ROLE, _TOOL, _THINK, _QUOTED, _COMMENT, _STOP)
_COUNTED = {_TOKEN, _SPACED, _TOOL, _THINK}


def _cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[i:j] for i, j in pairwise(edges)]


@given(
    st.lists(st.sampled_from(_EVENTS), min_size=1), st.lists(st.integers(0, 10_000)), st.booleans(), st.booleans()
)
def test_any_cut_gives_the_same_bytes_and_count(
    events: list[bytes], places: list[int], strip: bool, windows: bool
) -> None:
    data = b"".join(events) + (b"" if not strip else _USAGE) + _DONE
    wanted = b"".join(events) + _DONE
    if windows:
        data, wanted = data.replace(b"\n", b"\r\n"), wanted.replace(b"\n", b"\r\n")
    scanner = SseScanner(Api.CHAT, strip_usage=strip)
    out = b"".join(scanner.feed(piece) for piece in _cut(data, places)) + scanner.flush()
    assert out == wanted
    assert scanner.tokens == sum(event in _COUNTED for event in events)
    assert scanner.complete
    assert scanner.usage == (Usage(7, 2) if strip else None)


@given(
    st.lists(st.sampled_from((*_EVENTS, b"junk", b"\n", b"\r\n", b"\x00")), min_size=1),
    st.lists(st.integers(0, 999)),
)
def test_junk_passes_unchanged_too(parts: list[bytes], places: list[int]) -> None:
    data = b"".join(parts)
    for strip in (False, True):
        scanner = SseScanner(Api.CHAT, strip_usage=strip)
        assert b"".join(scanner.feed(piece) for piece in _cut(data, places)) + scanner.flush() == data


@pytest.mark.parametrize("event", [_COMMENT, _ROLE, _QUOTED])
def test_what_does_not_end_the_wait_for_the_first_token(event: bytes) -> None:
    scanner = SseScanner(Api.CHAT)
    scanner.feed(event)
    assert not scanner.opened


@pytest.mark.parametrize(
    "event",
    [
        *(_TOKEN, _TOOL, _THINK, _STOP, _DONE),
        b'data: {"error":{"message":"x"}}\n\n',
        b'data:{"error":"Model is overloaded","error_type":"overloaded"}\n\n',
    ],
)
def test_what_ends_it(event: bytes) -> None:
    scanner = SseScanner(Api.CHAT)
    scanner.feed(_ROLE + event)
    assert scanner.opened
    assert scanner.error_first == (b"error" in event)


def test_an_error_after_a_token_is_not_the_first() -> None:
    scanner = SseScanner(Api.CHAT)
    scanner.feed(_TOKEN + b'data: {"error":{"message":"x"}}\n\n')
    assert scanner.error is not None
    assert not scanner.error_first


def test_counts_come_from_continuous_usage_when_events_carry_more() -> None:
    scanner = SseScanner(Api.CHAT, counts_from_usage=True)
    for total in (3, 8):
        scanner.feed(
            b'data: {"choices":[{"delta":{"content":"abc"}}],"usage":{"completion_tokens":%d}}\n\n' % total
        )
    assert scanner.tokens == 8


_OWN = b'data:{"index":1,"token":{"id":5,"text":" a \\"token\\":{","logprob":-0.1},"generated_text":null}\n\n'
_OWN_LAST = b'data: {"index":2,"token":{"id":5,"text":" b","logprob":-0.1},"generated_text":" a b"}\n\n'


def test_tgis_own_events() -> None:
    scanner = SseScanner(Api.GENERATE)
    assert scanner.feed(_OWN) == _OWN
    assert (scanner.tokens, scanner.opened, scanner.complete) == (1, True, False)
    scanner.feed(_OWN_LAST)
    assert (scanner.tokens, scanner.complete, scanner.plain) == (2, True, True)
    assert scanner.text_bytes == len(b' a \\"token\\":{ b')


def _completion(choice: int, text: str, reason: str, usage: tuple[int, int] | None = None) -> bytes:
    event = b'data:{"choices":[{"index":%d,"text":"%b","finish_reason":"%b"}]' % (
        choice,
        text.encode(),
        reason.encode(),
    )
    told = b"" if usage is None else b',"usage":{"prompt_tokens":%d,"completion_tokens":%d}' % usage
    return event + told + b"}\n\n"


@pytest.mark.parametrize(
    ("text", "reason", "opened", "complete"),
    [("", "", False, False), ("a", "", True, False), ("", "length", True, True)],
)
def test_an_empty_reason_is_no_end(text: str, reason: str, opened: bool, complete: bool) -> None:
    scanner = SseScanner(Api.COMPLETIONS)
    scanner.feed(_completion(0, text, reason))
    assert (scanner.opened, scanner.complete) == (opened, complete)


def test_usage_beside_the_end_of_each_choice_adds_up() -> None:
    scanner = SseScanner(Api.COMPLETIONS, strip_usage=True)
    ends = _completion(1, "b", "length", (3, 5)), _completion(0, "", "eos_token", (4, 6))
    data = _completion(0, "a", "") + b"".join(ends) + _DONE
    assert scanner.feed(data) == data
    assert (scanner.tokens, scanner.usage) == (2, Usage(7, 11))


def test_usage_of_the_whole_replaces_that_of_choices() -> None:
    scanner = SseScanner(Api.COMPLETIONS)
    for choice in (0, 1):
        scanner.feed(_completion(choice, "a", "length", (7, 1)))
    assert scanner.usage == Usage(14, 2)
    scanner.feed(b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n')
    assert scanner.usage == Usage(7, 2)


def test_a_cut_stream_is_not_complete() -> None:
    scanner = SseScanner(Api.CHAT)
    scanner.feed(_TOKEN + _TOKEN[:30])
    assert not scanner.complete
    assert not scanner.between_events
    whole = SseScanner(Api.CHAT)
    whole.feed(_TOKEN)
    assert whole.between_events


def test_an_event_without_end_is_refused() -> None:
    scanner = SseScanner(Api.CHAT, limit_bytes=1000)
    scanner.feed(b"data: " + b"x" * 900)
    with pytest.raises(StreamTooWide):
        scanner.feed(b"x" * 100)


@pytest.mark.parametrize(
    ("event", "usage"),
    [
        (_USAGE, Usage(7, 2)),
        (b'data: {"type":"message_start","message":{"usage":{"input_tokens":4}}}\n\n', Usage(4, None)),
        (b'data: {"type":"x","response":{"usage":{"input_tokens":4,"output_tokens":1}}}\n\n', Usage(4, 1)),
        (b'data: {"usage":null}\n\n', None),
        (b'data: {"usage":{"prompt_tokens":"x","completion_tokens":-1}}\n\n', None),
        (b"data: {usage\n\n", None),
        (b": usage\n\n", None),
    ],
)
def test_usage_of_every_api(event: bytes, usage: Usage | None) -> None:
    assert read_usage(event) == usage
