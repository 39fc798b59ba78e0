"""What a server's /v1/models says."""

from __future__ import annotations

from dataclasses import dataclass

import orjson


@dataclass(frozen=True, slots=True)
class ModelList:
    """The models a server names. `max_model_tokens` is the smallest that is stated; None when none is."""

    names: tuple[str, ...]
    max_model_tokens: int | None
    owners: frozenset[str]
    emulated: bool

    @classmethod
    def read(cls, body: bytes, emulated: bool) -> ModelList:
        """Read an answer; whatever is not in OpenAI's shape is passed over, never an error."""
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            parsed = None
        listed = parsed.get("data") if isinstance(parsed, dict) else None
        entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        names = tuple(one["id"] for one in entries if isinstance(one.get("id"), str))
        lengths = [one["max_model_len"] for one in entries if _positive(one.get("max_model_len"))]
        owners = frozenset(one["owned_by"] for one in entries if isinstance(one.get("owned_by"), str))
        return cls(names, min(lengths, default=None), owners, emulated)


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
