"""Put members into a JSON body with the smallest change of its bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import orjson


def inserted(body: bytes, members: bytes) -> bytes:
    """The body with `members` (``"a":1,"b":2``) behind its opening brace.

    A member that the body has too is there twice then, and readers take the last. What is no JSON object comes
    back as it is.
    """
    brace = body.find(b"{")
    if brace < 0 or body[:brace].strip():
        return body
    rest = body[brace + 1 :]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b"".join((body[: brace + 1], members, comma, rest))


def with_members(body: bytes, members: Mapping[str, object]) -> bytes:
    """The body with these members in front, in place of its own of the same name.

    Where it has none of them, they are inserted and no other byte changes. Else it is parsed and written again,
    which changes white space, escapes and the spelling of numbers, never a value of the rest. What is not a JSON
    object comes back as it is.
    """
    if not members:
        return body
    if any(b'"%b"' % name.encode() in body for name in members):
        return _replaced(body, members)
    return inserted(body, orjson.dumps(members)[1:-1])


def _replaced(body: bytes, members: Mapping[str, object]) -> bytes:
    """By the standard library: it keeps whole numbers of any size, orjson makes floats of those beyond 64 bits."""
    try:
        parsed = json.loads(body)
        if not isinstance(parsed, dict):
            return body
        rest = {name: value for name, value in parsed.items() if name not in members}
        if len(rest) == len(parsed):
            return inserted(body, orjson.dumps(members)[1:-1])
        return json.dumps({**members, **rest}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return body
