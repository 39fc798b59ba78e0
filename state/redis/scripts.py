"""Running the Lua scripts: by digest, loaded where they are missing, and every way to fail told as one error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import TypeAlias

from redis.exceptions import NoScriptError

from state.contract import StoreUnavailable
from state.redis.connect import ERRORS, Answer, Connection
from state.redis.line import Line

Argument: TypeAlias = str | bytes | int


@dataclass(frozen=True, slots=True)
class Script:
    """One script: `name` is its file's, `digest` is what EVALSHA wants."""

    name: str
    source: str
    digest: str


def load_script(name: str, *pieces: str) -> Script:
    """Read `scripts/<name>.lua`, behind the shared pieces `scripts/_<piece>.lua` that it uses."""
    folder = files("state.redis") / "scripts"
    texts = [(folder / f"{part}.lua").read_text("utf-8") for part in (*(f"_{piece}" for piece in pieces), name)]
    source = "\n".join(texts)
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


class Runner:
    """Runs scripts over one line, each call within a deadline."""

    def __init__(self, connection: Connection, timeout_s: float, first_s: float = 0.0) -> None:
        """`timeout_s` is for a whole call, the opening of the line included; `first_s` for those before the first
        answer, where that is more."""
        self.timeout_s = timeout_s
        self._limit_s = max(timeout_s, first_s)
        self._line = Line(connection)

    async def run(self, script: Script, keys: tuple[str, ...], arguments: Iterable[Argument]) -> Answer:
        """What the script answers. Raises StoreUnavailable, and then it may have run or not."""
        words = (len(keys), *keys, *arguments)
        try:
            try:
                answer = await self._line.ask(keys[0], self._limit_s, "EVALSHA", script.digest, *words)
            except NoScriptError:
                answer = await self._line.ask(keys[0], self._limit_s, "EVAL", script.source, *words)
        except ERRORS as error:
            raise unavailable(script.name, error) from error
        self._limit_s = self.timeout_s
        return answer

    async def close(self) -> None:
        """Close the line. It opens again when it is used."""
        await self._line.close()


def unavailable(what: str, error: Exception) -> StoreUnavailable:
    """The one error there is, with what was asked and what went wrong."""
    return StoreUnavailable(f"{what}: {str(error) or 'no answer in time'} ({type(error).__name__})")
