"""Other processes that serve the same port: what one is asked about all of them."""

from __future__ import annotations

from typing import Protocol


class Siblings(Protocol):
    """The processes beside this one. Filled in where there are any."""

    async def metrics(self, own: bytes) -> bytes:
        """The text of `/metrics` for all of them together; `own` is this process's part."""
        ...

    async def carried(self, own: bytes) -> list[bytes]:
        """What each process carries, as JSON, `own` first. One that does not answer is missing."""
        ...

    async def decision(self, request_id: str) -> bytes | None:
        """A decision that another process has made, as JSON; None when none knows it."""
        ...
