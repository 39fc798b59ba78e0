"""A limit on an answer, which forgives a loop that was busy."""

from __future__ import annotations

import asyncio

import pytest

from state.deadline import within


async def test_an_answer_in_time_is_given() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(answer.set_result, 7)
    assert await within(5.0, answer) == 7


async def test_an_answer_that_does_not_come_is_cancelled() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await within(0.01, answer)
    assert answer.cancelled()


async def test_what_goes_wrong_is_told() -> None:
    async def fails() -> int:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await within(5.0, fails())


async def test_a_caller_that_gives_up_is_not_told_of_a_limit() -> None:
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(within(5.0, asyncio.Event().wait()))
        await asyncio.sleep(0)
        asking.cancel()
    assert asking.cancelled()


async def test_an_answer_that_came_while_the_loop_was_busy_counts() -> None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[int] = loop.create_future()
    loop.call_later(0.01, answer.set_result, 7)

    def busy() -> None:
        until_s = loop.time() + 0.1
        while loop.time() < until_s:
            pass

    async def pass_on(earlier: asyncio.Future[int]) -> int:
        return await earlier

    async with asyncio.TaskGroup() as tasks:  # as bytes pass through a reader before they are an answer
        passed = tasks.create_task(pass_on(tasks.create_task(pass_on(answer))))
        await asyncio.sleep(0)
        loop.call_soon(busy)
        assert await within(0.02, passed) == 7


async def test_a_process_that_stood_still_waits_anew() -> None:
    """The answer comes a while after the standstill, and within the limit from then on."""
    loop = asyncio.get_running_loop()

    async def answer() -> str:
        await asyncio.sleep(0)
        until_s = loop.time() + 0.5
        while loop.time() < until_s:
            pass
        await asyncio.sleep(0.05)
        return "here"

    assert await within(0.2, answer()) == "here"
