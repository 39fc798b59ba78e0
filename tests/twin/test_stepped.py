"""The event loop on a virtual clock."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.twin import stepped
from tests.twin.stepped import Stuck, run_stepped


def test_the_clock_stops_exactly_at_timers_and_takes_no_real_time() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        seen: list[float] = []
        ended = loop.create_future()
        for at_s in (86_400.7, 0.1, 0.3):
            loop.call_at(at_s, lambda: seen.append(loop.time()))
        loop.call_at(90_000.0, ended.set_result, None)
        await ended
        return seen

    assert run_stepped(main()) == [0.1, 0.3, 86_400.7]


def test_a_timer_that_was_cancelled_is_not_waited_for() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.call_at(1.0, lambda: None).cancel()
        await asyncio.sleep(2.0)
        return loop.time()

    assert run_stepped(main()) == 2.0


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def _serve() -> tuple[asyncio.Server, int]:
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def test_the_network_takes_no_time_even_when_a_timer_waits() -> None:
    async def main() -> tuple[int, float]:
        server, port = await _serve()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(0.001, lambda: None)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = bytes(3_000_000)  # more than the kernel's buffers hold
        writer.write(sent)
        writer.write_eof()
        received = await reader.read(-1)
        at_s = loop.time()
        timer.cancel()
        writer.close()
        server.close()
        await server.wait_closed()
        return len(received), at_s

    assert run_stepped(main()) == (3_000_000, 0.0)


def test_sockets_are_read_in_the_order_of_sending() -> None:
    async def main(order: list[int]) -> list[int]:
        accepted: list[asyncio.StreamWriter] = []
        read: list[int] = []

        async def keep(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.append(writer)

        async def listen(number: int, reader: asyncio.StreamReader) -> None:
            while await reader.read(10):
                read.append(number)

        server = await asyncio.start_server(keep, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        writers = []
        async with asyncio.TaskGroup() as tasks:
            for number in range(8):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writers.append(writer)
                tasks.create_task(listen(number, reader))
                await asyncio.sleep(1.0)
            for _ in range(2):
                for number in order:
                    accepted[number].write(b"x")
                await asyncio.sleep(1.0)
            for writer in accepted:
                writer.close()
        for writer in writers:
            writer.close()
        server.close()
        return read

    order = [5, 2, 7, 0, 1, 6, 3, 4]
    assert run_stepped(main(order)) == order + order
    assert run_stepped(main(order[::-1])) == order[::-1] + order[::-1]


def test_the_end_of_a_connection_is_seen_before_time_goes_on() -> None:
    async def main() -> float:
        server, port = await _serve()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(5.0)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        server.close()
        return asyncio.get_running_loop().time()

    assert run_stepped(main()) == 5.0


def test_threads_are_waited_for() -> None:
    async def main() -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        loop.call_later(0.001, lambda: None)

        def slow() -> str:
            time.sleep(0.05)
            return "done"

        return await asyncio.to_thread(slow), loop.time()

    assert run_stepped(main()) == ("done", 0.0)


def test_waiting_for_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepped, "PATIENCE_S", 0.05)

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="nothing happens"):
        run_stepped(main())
