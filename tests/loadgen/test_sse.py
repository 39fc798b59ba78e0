"""Counting tokens: independent of where the bytes are cut."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.sse import SseCounter, StreamBroken, StreamError
from tests.loadgen.conftest import DONE_EVENT, ROLE_EVENT, stream_bytes, token_event, usage_event

pieces = st.one_of(
    st.builds(token_event, st.text(min_size=1, max_size=20)),
    st.just(b": keep-alive\n\n"),
    st.just(ROLE_EVENT),
    st.just(b'data: {"choices": [{"index": 0, "text": "x", "finish_reason": null}]}\n\n'),
    st.just(b'data: {"choices":[{"index":0,"delta":{"reasoning_content":"x"},"finish_reason":null}]}\n\n'),
    st.just(b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"name":"f"}}]}}]}\n\n'),
)


def tokens_of(events: list[bytes]) -> int:
    """The slow way: decode everything."""
    tokens = 0
    for event in events:
        if not event.startswith(b"data: {"):
            continue
        choice = orjson.loads(event[6:])["choices"][0]
        delta = choice.get("delta", choice)
        tokens += any(delta.get(name) for name in ("content", "text", "reasoning_content", "tool_calls"))
    return tokens


def feed_cut(data: bytes, cuts: list[int]) -> SseCounter:
    counter, start = SseCounter(), 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        counter.feed(data[start:cut])
        start = cut
    return counter


@given(
    events=st.lists(pieces, max_size=12), cuts=st.lists(st.integers(0, 10_000), max_size=20), crlf=st.booleans()
)
def test_tokens_do_not_depend_on_cuts_or_line_ends(events: list[bytes], cuts: list[int], crlf: bool) -> None:
    data = b"".join(events) + usage_event(7) + DONE_EVENT
    if crlf:
        data = data.replace(b"\n", b"\r\n")
    counter = feed_cut(data, cuts)
    assert counter.tokens == tokens_of(events)
    assert counter.usage_tokens == 7
    assert counter.done
    assert counter.ended


def test_every_byte_alone() -> None:
    data = stream_bytes(40)
    counter = feed_cut(data, list(range(len(data))))
    assert counter.tokens == 40


def test_feed_returns_what_it_completed() -> None:
    counter = SseCounter()
    assert counter.feed(ROLE_EVENT) == 0
    assert counter.feed(token_event()) == 1
    assert counter.feed(token_event() + token_event()[:-1]) == 1
    assert counter.feed(b"\n") == 1


def test_text_cannot_imitate_the_field() -> None:
    counter = SseCounter()
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    note = '"content":"x" \\"text\\":\\"y'
    assert counter.feed(b"data: " + orjson.dumps({"id": note, "choices": [choice]}) + b"\n\n") == 0


def test_withheld_text_still_counts_after_the_first_token() -> None:
    empty = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}\n\n'
    counter = SseCounter()
    assert counter.feed(empty) == 0
    counter.feed(token_event())
    assert counter.feed(empty) == 1


def test_a_finish_reason_ends_a_stream_without_done() -> None:
    counter = SseCounter()
    counter.feed(token_event())
    assert not counter.ended
    counter.feed(token_event(finish="stop"))
    assert counter.ended


@pytest.mark.parametrize(
    ("event", "status", "kind"),
    [
        (
            b'data: {"error":{"message":"busy","type":"Service Unavailable","code":503}}\n\n',
            503,
            "Service Unavailable",
        ),
        (b'event: error\ndata: {"error":{"message":"no","type":"t","code":"saturated"}}\n\n', None, "saturated"),
        (b'data: {"object":"error","message":"old","type":"BadRequest","code":400}\n\n', 400, "BadRequest"),
        (b'data: {"error":"plain"}\n\n', None, "error"),
    ],
)
def test_an_error_event_is_raised(event: bytes, status: int | None, kind: str) -> None:
    with pytest.raises(StreamError) as caught:
        SseCounter().feed(event)
    assert (caught.value.status, caught.value.kind) == (status, kind)


def test_garbage_is_named() -> None:
    with pytest.raises(StreamBroken, match="not JSON"):
        SseCounter().feed(b"data: <html>\n\n")
    counter = SseCounter()
    with pytest.raises(StreamBroken, match="longer than"):
        counter.feed(b"x" * 17 * 1024 * 1024)
