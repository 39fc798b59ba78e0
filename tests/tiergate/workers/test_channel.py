"""What supervisor and worker say to each other."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tiergate.workers.channel import Channel, Kind, Message, Topic


async def _pair() -> tuple[Channel, Channel]:
    one, two = socket.socketpair()
    return await Channel.over(one), await Channel.over(two)


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.READY, text="30"),
        Message(Kind.QUESTION, 7, Topic.METRICS, 'a{b="c"} 1\nd 2\n'),
        Message(Kind.STOP),
    ],
)
def test_a_message_is_read_as_it_was_written(message: Message) -> None:
    assert Message.read(message.line()) == message
    assert message.line().count(b"\n") == 1


async def test_questions_are_answered_in_any_order() -> None:
    asker, other = await _pair()
    async with asyncio.TaskGroup() as tasks:
        hearing = tasks.create_task(asker.receive())
        first = tasks.create_task(asker.ask(Topic.DECISION, "a", within_s=10))
        second = tasks.create_task(asker.ask(Topic.DECISION, "b", within_s=10))
        questions = [await other.receive(), await other.receive()]
        for question in reversed(questions):
            assert question is not None
            other.answer(question, f"about {question.text}")
        assert (await first, await second) == ("about a", "about b")
        other.send(Message(Kind.RETIRE))
        assert await hearing == Message(Kind.RETIRE)
    await asker.close()
    await other.close()


async def test_one_that_is_gone_answers_nothing_at_once() -> None:
    asker, other = await _pair()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(asker.ask(Topic.METRICS, within_s=60))
        assert await other.receive() is not None
        await other.close()
        assert await asker.receive() is None
        assert await asking is None
    assert await asker.ask(Topic.METRICS, within_s=60) is None
    asker.send(Message(Kind.RETIRE))
    await asker.close()


async def test_one_that_stands_still_is_not_asked_for_ever() -> None:
    asker, other = await _pair()
    for _ in range(20):
        assert await asker.ask(Topic.METRICS, within_s=0.001) is None
    await asker.close()
    asked = 0
    while await other.receive() is not None:
        asked += 1
    assert 0 < asked < 20
    await other.close()
