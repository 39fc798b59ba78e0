"""What the emulated engine costs: CPU per streamed token, and how late its steps are.

Starts `tiergate emulate` with four engines, keeps a number of streams open on each, paced by the profile's step
times, and reads the server process's CPU time from /proc. Requests and tokens are separated by two runs with
answers of different length. Run: python -m bench.emulator_cost
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Phase:
    """What one run cost the server."""

    cpu_s: float
    wall_s: float
    requests: int
    tokens: int


async def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="rtxpro6000-qwen3-32b-bf16")
    parser.add_argument("--streams", type=int, default=60, help="streams per engine")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each of the two runs")
    args = parser.parse_args(argv)
    server = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tiergate", "emulate", "--profile", args.profile, "--port", "0", "--count", str(args.engines)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout is not None
    try:
        ports = [_port(await server.stdout.readline()) for _ in range(args.engines)]
        await _load(server.pid, ports, 2, 20, 1.0)  # warm up
        short = await _load(server.pid, ports, args.streams, 20, args.seconds)
        long = await _load(server.pid, ports, args.streams, 200, args.seconds)
    finally:
        server.terminate()
        await server.wait()
    # Two equations: cpu = requests * r + tokens * t.
    determinant = short.requests * long.tokens - long.requests * short.tokens
    per_token_s = (short.requests * long.cpu_s - long.requests * short.cpu_s) / determinant
    per_request_s = (short.cpu_s * long.tokens - long.cpu_s * short.tokens) / determinant
    print(f"emulated engines: {args.engines}, profile {args.profile}, {args.streams} streams each")
    for name, run in (("20-token answers", short), ("200-token answers", long)):
        print(
            f"{name}: {run.tokens / run.wall_s:.0f} tokens/s, {run.requests / run.wall_s:.1f} requests/s, "
            f"CPU {run.cpu_s / run.wall_s:.1%} of a core, {run.cpu_s / run.tokens * 1e6:.1f} us/token all in"
        )
    print(f"CPU per streamed token {per_token_s * 1e6:.1f} us, per request {per_request_s * 1e6:.0f} us")


async def _load(pid: int, ports: Sequence[int], streams: int, tokens: int, seconds: float) -> Phase:
    started_s, cpu_s = time.monotonic(), _cpu_s(pid)
    ends_s = started_s + seconds
    counts: list[tuple[int, int]] = []

    async def one(port: int, number: int) -> None:
        await asyncio.sleep(number / streams * 0.5)  # spread the prefills
        requests = 0
        while time.monotonic() < ends_s:
            await _stream(port, tokens)
            requests += 1
        counts.append((requests, requests * tokens))

    async with asyncio.TaskGroup() as tasks:
        for port in ports:
            for number in range(streams):
                tasks.create_task(one(port, number))
    return Phase(
        _cpu_s(pid) - cpu_s,
        time.monotonic() - started_s,
        sum(requests for requests, _ in counts),
        sum(produced for _, produced in counts),
    )


async def _stream(port: int, tokens: int) -> None:
    """One streamed completion, read to its end with as little of our own CPU as can be."""
    body = orjson.dumps({"prompt": "word " * 20, "max_tokens": tokens, "ignore_eos": True, "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n" + body)
    seen = 0
    while data := await reader.read(65_536):
        seen += data.count(b'"index":0')
    writer.close()
    await writer.wait_closed()
    if seen != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {seen}")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _port(line: bytes) -> int:
    found = re.search(rb"http://[^:]+:(\d+)", line)
    if found is None:
        raise RuntimeError(f"the emulated engine did not say where it listens: {line!r}")
    return int(found[1])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
