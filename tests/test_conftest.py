"""What the shared fixtures promise: a blocking call of ours fails its test, others do not; the loop is uvloop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from blockbuster import BlockingError

import gateway


def _sleeper(filename: str) -> Callable[[], None]:
    """A function that blocks, as if it stood in a file."""
    names: dict[str, Callable[[], None]] = {}
    exec(compile("import time\ndef block():\n    time.sleep(0.001)", filename, "exec"), names)  # noqa: S102
    return names["block"]


def _in_gateway() -> Callable[[], None]:
    return _sleeper(str(Path(gateway.__file__).parent / "imagined.py"))


async def test_blocking_in_our_packages_fails_in_the_event_loop() -> None:
    with pytest.raises(BlockingError):
        _in_gateway()()


async def test_blocking_in_a_thread_is_allowed() -> None:
    await asyncio.to_thread(_in_gateway())


async def test_a_test_and_a_library_may_block() -> None:
    time.sleep(0.001)  # noqa: ASYNC251 (the subject of this test)
    _sleeper(asyncio.__file__)()


def test_blocking_without_a_loop_is_allowed() -> None:
    _in_gateway()()


async def test_the_loop_is_uvloop() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
