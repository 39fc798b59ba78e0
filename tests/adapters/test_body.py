"""Members put into a body: there once, and nothing else of it changed."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.body import inserted, with_members

MEMBERS = {"rid": "tg-1", "priority": 7}
NAMES = st.sampled_from(["rid", "priority", "a", "b", "messages"])
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just({"rid": 1, "x": [1.5]})


@given(st.dictionaries(NAMES, VALUES), st.booleans())
def test_every_member_is_there_once_and_the_rest_is_as_it_was(fields: dict[str, object], indented: bool) -> None:
    body = json.dumps(fields, indent=2 if indented else None).encode()
    pairs = json.loads(with_members(body, MEMBERS), object_pairs_hook=list)
    assert len({name for name, _ in pairs}) == len(pairs)
    found = json.loads(with_members(body, MEMBERS))
    assert found == {**fields, **MEMBERS}
    assert list(found)[:2] == ["rid", "priority"]


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{ "a" : 1.0, "b":"\\u00fc" }', b'{"rid":"tg-1","priority":7, "a" : 1.0, "b":"\\u00fc" }'),
        (b"{}", b'{"rid":"tg-1","priority":7}'),
        (b' {"a":1}', b' {"rid":"tg-1","priority":7,"a":1}'),
        (b'{"a":{"rid":1}}', b'{"rid":"tg-1","priority":7,"a":{"rid":1}}'),
        (b'{"s":"priority"}', b'{"rid":"tg-1","priority":7,"s":"priority"}'),
        (b'{"rid":1,"n":12345678901234567890123}', b'{"rid":"tg-1","priority":7,"n":12345678901234567890123}'),
    ],
)  # fmt: skip
def test_as_few_bytes_as_can_be(body: bytes, sent: bytes) -> None:
    assert with_members(body, MEMBERS) == sent


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"x{", b'["rid"]', b'{"rid":', b'{"rid":NaN,"a":NaN}', b"[" * 9000 + b'"rid"']
)
def test_what_is_no_object_comes_back_as_it_is(body: bytes) -> None:
    assert with_members(body, MEMBERS) == body


def test_nothing_to_put_in() -> None:
    assert with_members(b'{"rid":1}', {}) == b'{"rid":1}'
    assert orjson.loads(inserted(b'{"rid":1}', b'"rid":2')) == {"rid": 1}, "readers take the last"
