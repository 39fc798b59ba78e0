"""Reading a stream for its token times, also when an engine puts several tokens into one event."""

from __future__ import annotations

import orjson
import pytest

from adapters import registry
from profiles.measure import MeasureError
from tiergate.probe_connection import _Events


def _event(completion_tokens: int | None, text: str = "a") -> bytes:
    usage = None if completion_tokens is None else {"prompt_tokens": 7, "completion_tokens": completion_tokens}
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "text": text}], "usage": usage}) + b"\n\n"


def _usage(completion_tokens: int) -> bytes:
    usage = {"prompt_tokens": 7, "completion_tokens": completion_tokens}
    return b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n"


@pytest.fixture
async def events() -> _Events:
    return _Events(registry.make("vllm", "http://127.0.0.1:9"))


async def test_one_token_an_event(events: _Events) -> None:
    for number in range(1, 4):
        events.feed(_event(number), float(number))
    events.feed(_usage(3), 4.0)
    assert events.token_times() == (1.0, 2.0, 3.0)
    assert events.prompt_tokens == 7


async def test_merged_tokens_are_spread_over_the_time_they_took(events: _Events) -> None:
    events.feed(_event(1), 1.0)
    events.feed(_event(4), 2.5)
    events.feed(_event(5), 3.0)
    events.feed(_usage(5), 3.0)
    assert events.token_times() == (1.0, 1.5, 2.0, 2.5, 3.0)


async def test_an_event_that_only_ends_the_stream_is_no_token(events: _Events) -> None:
    events.feed(_event(1), 1.0)
    events.feed(_event(2), 2.0)
    events.feed(_event(2, text=""), 2.1)
    events.feed(_usage(2), 2.2)
    assert events.token_times() == (1.0, 2.0)


async def test_merged_tokens_without_a_running_count_cannot_be_measured(events: _Events) -> None:
    events.feed(_event(None), 1.0)
    events.feed(_event(None), 2.0)
    events.feed(_usage(9), 2.2)
    with pytest.raises(MeasureError, match="several tokens"):
        events.token_times()
