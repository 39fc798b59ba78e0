"""`tiergate serve` as a process: reload on SIGHUP, graceful end on SIGTERM, the request log; `tiergate check`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.gateway.rig import MODEL, PROFILE, Client, Engine, engine, until, until_told

MIXED_FLEET = Path(__file__).resolve().parents[2] / "deploy" / "mixed_fleet" / "tiergate.yaml"


@asynccontextmanager
async def _serving(
    command: Sequence[str], port: int, *arguments: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Client]]:
    process = await asyncio.create_subprocess_exec(
        *command, "serve", "--port", str(port), *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with aiohttp.ClientSession() as session:
            ask = Client(session, port)
            await until_told(lambda: _ready(ask))
            yield process, ask
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _ready(ask: Client) -> bool:
    try:
        async with ask.session.get(f"{ask.base}/readyz") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def test_sigterm_lets_streams_end_and_the_log_tells_of_each(
    tiergate_command: list[str], free_port: Callable[[], int]
) -> None:
    async with engine() as one:
        backend = f"{one.url},profile={PROFILE}"
        async with _serving(tiergate_command, free_port(), "--backend", backend) as (process, ask):
            async with ask.chat("first_then_wait", headers={"x-request-id": "the-one"}) as stream:
                await until(lambda: one.streams == 1)
                process.send_signal(signal.SIGTERM)
                await until_told(lambda: _not_ready(ask))
                one.release.set()
                assert (await stream.read()).endswith(b"data: [DONE]\n\n")
            assert process.stdout is not None
            lines = (await process.stdout.read()).splitlines()
            assert await process.wait() == 0
    told = orjson.loads(lines[-1])
    assert (told["request_id"], told["end"], told["model"], told["output_tokens"]) == (
        "the-one",
        "finished",
        MODEL,
        4,
    )
    assert "hello there" not in str(lines)


async def test_sighup_reads_the_file_again(
    tiergate_command: list[str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    path = tmp_path / "tiergate.yaml"

    def write(tier: str, one: Engine) -> None:
        backend = {"url": one.url, "name": "one", "profile": PROFILE}
        tiers = [{"name": tier, "ttft_ms": 2000, "tpot_ms": 80}]
        path.write_bytes(orjson.dumps({"backends": [backend], "tiers": tiers, "default_tier": tier}))

    async with engine() as one:
        write("before", one)
        async with _serving(tiergate_command, free_port(), "--config", str(path), "--quiet") as (process, ask):
            assert await _tier(ask) == "before"
            process.send_signal(signal.SIGUSR2)  # which is for workers, and ends nobody
            path.write_text("tiers: broken")
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)
            assert await _tier(ask) == "before"
            write("after", one)
            process.send_signal(signal.SIGHUP)
            await until_told(lambda: _tier_is(ask, "after"))
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_the_request_log_file_is_followed_when_it_is_rotated(
    tiergate_command: Sequence[str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    config, path, moved = tmp_path / "tiergate.yaml", tmp_path / "requests.jsonl", tmp_path / "requests.1"
    async with engine() as one:
        backends = [{"url": one.url, "profile": PROFILE}]
        config.write_bytes(orjson.dumps({"backends": backends, "request_log": str(path), "log_requests": False}))
        async with _serving(tiergate_command, free_port(), "--config", str(config)) as (process, ask):
            await _chat(ask, "first")
            await until(lambda: path.stat().st_size > 0)
            path.rename(moved)
            process.send_signal(signal.SIGHUP)
            await until(path.exists)
            await _chat(ask, "second")
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            assert process.stdout is not None
            assert await process.stdout.read() == b""
    told = [[orjson.loads(text)["request_id"] for text in one.read_bytes().splitlines()] for one in (moved, path)]
    assert told == [["first"], ["second"]]


async def _chat(ask: Client, name: str) -> None:
    status, _ = await ask.read_chat(headers={"x-request-id": name})
    assert status == 200


async def _not_ready(ask: Client) -> bool:
    return not await _ready(ask)


async def _tier_is(ask: Client, name: str) -> bool:
    return await _tier(ask) == name


async def _tier(ask: Client) -> str:
    async with ask.chat() as answer:
        await answer.read()
        return answer.headers["x-tiergate-tier"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["check"], 0, "chat (default): first token 2000 ms, each token 50 ms"),
        (["check", "--backend", f"http://h:1,profile={PROFILE},tier=fast"], 0, "starts in tier fast"),
        (["check", "--backend", "http://h:1,profile=h200"], 2, "no profile is named 'h200'"),
        (["check", "--policy", "nope"], 2, "unknown policy 'nope'"),
        (["check", "--config", "/nowhere.yaml"], 2, "No such file"),
        (["serve"], 2, "no backend: give --backend"),
        (["serve", "--store", "redis://127.0.0.1:1"], 2, "no backend: the configuration names none"),
        (["check", "--config", str(MIXED_FLEET)], 0, "tgi-1: http://tgi-1:3000, engine tgi"),
        (["check"], 0, "Request log: standard output."),
        (["check"], 0, "One process; state in memory."),
        (
            ["check", "--store", "redis://user:secret@h:7/0", "--workers", "2"],
            0,
            "2 workers; state shared at redis://h:7/0 as fleet default.",
        ),
        (["check", "--store", "rediss://h:7/0?tls_ca=/nowhere"], 2, "store.url: tls_ca: /nowhere"),
        (["check", "--store", "http://h:7"], 2, "store.url: must begin with redis://"),
    ],
)
async def test_check_explains(tiergate_command: list[str], arguments: list[str], code: int, told: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *tiergate_command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == code
    assert told in output.decode()


async def test_check_names_a_request_log_that_cannot_be_kept(tiergate_command: list[str], tmp_path: Path) -> None:
    """And leaves no file behind where one can."""
    for path, code, told in (
        (
            tmp_path / "nowhere" / "log",
            2,
            f"request_log: {tmp_path}/nowhere/log: the folder {tmp_path}/nowhere is not",
        ),
        (tmp_path / "log", 0, f"Request log: standard output and {tmp_path}/log."),
    ):
        config = tmp_path / "tiergate.yaml"
        config.write_bytes(orjson.dumps({"request_log": str(path)}))
        process = await asyncio.create_subprocess_exec(
            *tiergate_command, "check", "--config", str(config),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        assert process.returncode == code
        assert told in output.decode()
        assert not path.exists()
