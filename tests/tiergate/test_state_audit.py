"""`tiergate state audit` on real gateways, a real Redis and emulated engines, with damage done on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson
import pytest

from scheduling.load import Cost, Limits, ReserveCandidate
from state.redis.address import parse_url
from state.redis.codec import items, pack_candidates, text
from state.redis.connect import connect
from state.redis.inventory import InventoryReader
from state.redis.keys import Keys
from state.redis.scripts import load_script
from tests.chaos.load import Shape, offer, plan_crowds
from tests.chaos.stand import ADMIN_TOKEN, FLEET, MIX, MODEL, Size, Stand, standing
from tiergate.cli import main

_LEASE_S = 5.0
_ANYTHING = Limits(10**9, 10**9, 10**9)
_PATIENCE_S = 30.0
_RESERVE = load_script("reserve")


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit said."""

    code: int
    kinds: Sequence[str]
    differences: Sequence[Mapping[str, object]]
    backends: Mapping[str, Mapping[str, int]]
    said: Mapping[str, object]


async def _audit(stand: Stand, *flags: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tiergate", "state", "audit", "--config", str(stand.config), *flags),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **environment},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def _look(stand: Stand) -> Audited:
    code, out, err = await _audit(stand, "--json", "--pause-s", "0.2")
    assert out, err
    said = orjson.loads(out)
    found = said["differences"]
    return Audited(code, sorted(one["kind"] for one in found), found, said["backends"], said)


@contextlib.asynccontextmanager
async def _streams(*urls: str, each: int) -> AsyncIterator[None]:
    """Long answers that are being read; they are cut at the end."""
    body = {"model": MODEL, "prompt": "a few words", "max_tokens": 5000, "ignore_eos": True, "stream": True}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as http,
        asyncio.TaskGroup() as tasks,
    ):
        first = [asyncio.Event() for _ in range(each * len(urls))]

        async def read(url: str, begun: asyncio.Event) -> None:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.post(f"{url}/completions", json=body, headers={"x-slo-tier": "slow"}) as answer:
                    async for _ in answer.content:
                        begun.set()

        reading = [tasks.create_task(read(urls[number % len(urls)], one)) for number, one in enumerate(first)]
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*(one.wait() for one in first))
        yield
        for task in reading:
            task.cancel()


async def _leak(stand: Stand, lease: str) -> str:
    """Reserve in a live replica's name what it never asked for, with the store's own script; which replica."""
    assert stand.store is not None
    keys = Keys.of(FLEET)
    async with connect(parse_url(stand.store.server.url)) as store:
        seen = await InventoryReader(store, FLEET).read()
        replica = min(seen.live)
        number = text(await store.run("HGET", keys.leases(replica), ""))
        epoch = seen.standings["engine0"].epoch
        wanted = ReserveCandidate("engine0", Cost(1, 10, 1, "slow", 200.0), _ANYTHING, 0.0, epoch)
        names = (keys.load, keys.leases(replica), keys.ended(replica))
        words = (replica, number, lease, *pack_candidates([wanted]))
        answer = items(await store.run("EVAL", _RESERVE.source, len(names), *names, *words))
        assert answer[0] == 1
    return replica


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_an_audit_names_what_was_done_behind_the_gateways_backs(tmp_path: Path) -> None:
    size = Size(gateways=2, engines=2, cap=8, lease_s=_LEASE_S)
    async with standing(size, tmp_path) as stand:
        urls = [url for _, url in stand.urls()]
        idle = await _look(stand)
        assert (idle.code, idle.kinds) == (0, []), idle.said
        denied, out, _ = await _audit(stand, "--readings", "2", TIERGATE_ADMIN_TOKEN=f"not-{ADMIN_TOKEN}")
        assert denied == 2, out
        assert "401" in out
        await _while_requests_come_and_go(stand)
        engine = f"http://127.0.0.1:{stand.engine_ports['engine1']}/v1"
        async with _streams(*urls, each=3):
            busy = await _look(stand)
            assert (busy.code, busy.kinds) == (0, []), busy.said
            assert sum(one["sequences"] for one in busy.backends.values()) == 6
            assert sum(one["engine_sequences"] for one in busy.backends.values()) == 6

            async with _streams(engine, each=2):
                past = await _look(stand)
                assert (past.code, past.kinds) == (1, ["engine has more"]), past.said

            replica = await _leak(stand, "never-asked-for")
            leaked = await _look(stand)
            assert (leaked.code, leaked.kinds) == (1, ["leaked lease"]), leaked.said
            one = leaked.differences[0]
            assert (one["replica"], one["lease"], one["backend"]) == (replica, "never-asked-for", "engine0")
            code, out, _ = await _audit(stand)
            assert code == 1
            assert "Likely cause" in out
            assert "Does not heal by itself" in out

        await _the_dead(stand)
        assert stand.store is not None
        stand.store.kill()
        code, _, err = await _audit(stand)
        assert code == 2
        assert "cannot be read" in err


async def _while_requests_come_and_go(stand: Stand) -> None:
    """Short requests, some of whose clients hang up: what differs between two readings is no difference."""
    crowds = plan_crowds(stand.urls(), MIX, Shape(vanishing=0.3), duration_s=5.0, seed=1)
    async with asyncio.TaskGroup() as tasks:
        offered = tasks.create_task(offer(crowds, MODEL, seed=1))
        await asyncio.sleep(1.0)
        found = await _look(stand)
    assert (found.code, found.kinds) == (0, []), found.said
    assert len(offered.result()) > 30


async def _the_dead(stand: Stand) -> None:
    """Kill the gateways: one is reported dead, and what it left goes away."""
    await asyncio.to_thread(stand.gateways["gateway1"].kill)
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            seen = await _look(stand)
            if "dead replica" in seen.kinds:
                break
            assert seen.code in {1, 2}, seen.said  # the leak, and a gateway that does not answer
        while seen.kinds not in ([], ["leaked lease"]):
            seen = await _look(stand)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --store"),
        (["--store", "embedded"], "which only the gateways' own processes can see"),
        (["--store", "mongodb://x"], "must begin with"),
        (["--store", "redis://127.0.0.1:1", "--readings", "1"], "--readings"),
        (["--store", "redis://127.0.0.1:1"], "the store cannot be read"),
    ],
)
def test_what_cannot_be_audited_ends_with_two(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["state", "audit", *flags]) == 2
    assert said in capsys.readouterr().err
