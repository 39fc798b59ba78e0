"""How evenly processes on one port share out connections: `python -m bench.accept_shares`.

Three ways: one listening socket in all of them and whoever wakes first accepts (`plain`), a socket for each with
SO_REUSEPORT (`reuseport`), and one socket with turns as `gateway.acceptor` takes them (`turns`). Each is met by a
burst of connections, and by the same number one after the other. Printed are connections by process, most first.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import time
from collections.abc import Sequence

import uvloop
from aiohttp import web

from gateway.acceptor import Acceptor
from gateway.config import Settings
from gateway.server import GatewayServer
from tiergate.workers.board import Board, Share

WAYS = ("plain", "reuseport", "turns")
START_S = 1.0
SETTLE_S = 0.3
GAP_S = 0.005


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    print(f"{args.connections} connections to {args.processes} processes, {args.rounds} rounds\n")
    print("| way | all at once | one after the other |")
    print("|---|---|---|")
    for way in WAYS:
        cells = [
            "; ".join(_told(_round(way, args.processes, args.connections, gap_s)) for _ in range(args.rounds))
            for gap_s in (0.0, GAP_S)
        ]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)
    return 0


def _told(shares: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(shares, reverse=True)))


def _round(way: str, processes: int, connections: int, gap_s: float) -> list[int]:
    """Connections by process."""
    board = Board.create(processes)
    listeners = [_listen(0, reuse=way == "reuseport")]
    port = listeners[0].getsockname()[1]
    if way == "reuseport":
        listeners += [_listen(port, reuse=True) for _ in range(processes - 1)]
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=_serve, args=(way, listeners[slot % len(listeners)], board, slot), daemon=True)
        for slot in range(processes)
    ]
    for process in started:
        process.start()
    time.sleep(START_S)
    try:
        return uvloop.run(_connect(port, connections, gap_s, board))
    finally:
        for process in started:
            process.kill()
            process.join()
        for listener in listeners:
            listener.close()
        board.close()


def _listen(port: int, *, reuse: bool) -> socket.socket:
    listener = socket.socket()
    if reuse:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    listener.setblocking(False)
    return listener


async def _connect(port: int, connections: int, gap_s: float, board: Board) -> list[int]:
    if gap_s:
        opened = []
        for _ in range(connections):
            opened.append(await asyncio.open_connection("127.0.0.1", port))
            await asyncio.sleep(gap_s)
    else:
        opening = (asyncio.open_connection("127.0.0.1", port) for _ in range(connections))
        opened = await asyncio.gather(*opening)
    await asyncio.sleep(SETTLE_S)
    shares = [board.read(slot) or 0 for slot in range(board.slots)]
    for _, writer in opened:
        writer.close()
    return shares


def _serve(way: str, listener: socket.socket, board: Board, slot: int) -> None:
    """One process, until it is killed."""
    uvloop.run(_accept(way, listener, Share(board, slot)))


async def _accept(way: str, listener: socket.socket, share: Share) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    server = GatewayServer(answer, Settings())
    async with asyncio.TaskGroup() as tasks:
        if way == "turns":
            Acceptor(server, [listener], share, tasks).start()
        else:
            server.on_connections = share.tell
            share.tell(0)
            await asyncio.get_running_loop().create_server(server, sock=listener)
        await asyncio.Event().wait()


if __name__ == "__main__":
    raise SystemExit(main())
