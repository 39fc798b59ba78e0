"""Workers behind one port, as real processes: what clients see when workers die, are replaced, or stop.

The engines are emulated. The tests of the first part share one service; each but the last leaves it as it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
import orjson
import pytest

from deploy.server_process import free_port
from tests.adversary.stand import write_config
from tests.tiergate.workers.rig import (
    SERVE,
    Service,
    admin,
    alive,
    ask,
    clients,
    kill,
    metrics,
    ready,
    serving,
    stream,
    until,
    until_told,
    whole,
)
from tiergate.audit.readings import Carried, read_carried

WORKERS = 2
TOKENS = 100


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("workers")
    with serving(folder, "--workers", str(WORKERS), "--store", "embedded", store={"lease_s": 2}) as made:
        yield made


async def _all_up(service: Service) -> None:
    """Wait until every worker serves, and nobody is on the way out."""
    async with clients() as session:

        async def up() -> bool:
            found = await metrics(session, service)
            serving = [found.get(f"tiergate_worker_up{{worker={number}}}") for number in range(WORKERS)]
            return serving == [1.0] * WORKERS and len(service.workers()) == WORKERS

        await until_told(up)


async def _arrived(
    session: aiohttp.ClientSession, service: Service, before: dict[str, float], more: int
) -> dict[str, float]:
    """What is told once so many more requests have arrived."""
    found = before

    async def told() -> bool:
        nonlocal found
        found = await metrics(session, service)
        name = "tiergate_requests_arrived_total{}"
        return found[name] >= before[name] + more

    await until_told(told)
    return found


async def test_requests_are_shared_out_and_counted_together(service: Service) -> None:
    async with clients() as session:
        before = await metrics(session, service)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream(session, service, TOKENS)) for _ in range(10)]
            during = await _arrived(session, service, before, 10)
        assert all(whole(one.result(), TOKENS) for one in running)
        after = await metrics(session, service)

    def more(sample: str) -> float:
        return after[sample] - before.get(sample, 0.0)

    assert during["tiergate_requests_running{}"] + during["tiergate_requests_held{}"] == 10
    assert more("tiergate_requests_arrived_total{}") == 10
    assert more("tiergate_requests_ended_total{end=finished}") == 10
    assert more("tiergate_queue_seconds_count{tier=t150}") == 10
    assert more("tiergate_queue_seconds_bucket{le=+Inf,tier=t150}") == 10
    shares = [more(f"tiergate_worker_requests_total{{worker={number}}}") for number in range(WORKERS)]
    assert sum(shares) == 10
    assert min(shares) >= 3, f"one worker got nearly all: {shares}"
    for number in range(WORKERS):
        assert during[f"tiergate_worker_connections{{worker={number}}}"] >= 3
        assert f"tiergate_loop_lag_seconds{{worker={number}}}" in after


async def test_a_decision_is_told_by_whoever_is_asked(service: Service) -> None:
    async with clients() as session:
        for _ in range(4):
            await ask(session, service)
        status, body = await ask(session, service, stream=False)
        assert status == 200, body
        async with session.post(
            f"{service.base}/v1/chat/completions",
            json={"model": "Qwen/Qwen3-32B", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
            headers={"authorization": "Bearer sk-a", "x-request-id": "asked-for"},
        ) as answer:
            assert answer.status == 200
        # several connections, so both workers are asked
        for _ in range(6):
            status, body = await admin(session, service, "decisions/asked-for")
            assert (status, orjson.loads(body)["request_id"]) == (200, "asked-for")
        assert (await admin(session, service, "decisions/never-made"))[0] == 404


async def test_what_all_workers_carry_is_told_by_whoever_is_asked(service: Service) -> None:
    told: Sequence[Carried] = ()

    async def all_carried() -> bool:
        nonlocal told
        status, body = await admin(session, service, "carried")
        assert status == 200
        told = read_carried(body)
        return sum(len(one.leases) for one in told) == 10

    async with clients() as session:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream(session, service, TOKENS)) for _ in range(10)]
            await until_told(all_carried)
        assert all(whole(one.result(), TOKENS) for one in running)
    assert len({one.replica for one in told}) == WORKERS
    assert {one.fleet for one in told} == {"default"}


async def test_a_killed_worker_is_replaced_and_its_siblings_streams_go_on(service: Service) -> None:
    async with clients() as session:
        before = await metrics(session, service)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream(session, service, TOKENS)) for _ in range(10)]
            counted = await _arrived(session, service, before, 10)
            old = service.workers()
            kill(old[0], signal.SIGKILL)
            # Somebody always accepts: requests that come now are served.
            served = [tasks.create_task(stream(session, service, 5)) for _ in range(10)]
        broken = [one for one in running if not whole(one.result(), TOKENS)]
        shares = {
            counted[name] - before.get(name, 0.0)
            for name in (f"tiergate_worker_requests_total{{worker={number}}}" for number in range(WORKERS))
        }
        assert len(broken) in shares, "exactly the streams of the killed worker broke"
        assert 0 < len(broken) < 10
        assert [one.result()[0] for one in served] == [200] * 10
        assert all(whole(one.result(), 5) for one in served)
        await _all_up(service)
        after = await metrics(session, service)
    assert old[0] not in service.workers()
    assert old[1] in service.workers()
    assert after["tiergate_worker_restarts_total{}"] == before["tiergate_worker_restarts_total{}"] + 1
    # What the killed worker had told before is still counted.
    assert after["tiergate_requests_arrived_total{}"] == counted["tiergate_requests_arrived_total{}"] + 10


async def test_a_rolling_restart_loses_nothing(service: Service) -> None:
    await _all_up(service)
    old = service.workers()
    stop = asyncio.Event()

    async def newcomers() -> list[tuple[int, bytes]]:
        answers = []
        while not stop.is_set():
            answers.append(await stream(session, service, 2))
            await asyncio.sleep(0.01)
        return answers

    async def fewest_up() -> float:
        fewest = float(WORKERS)
        while not stop.is_set():
            found = await metrics(session, service)
            fewest = min(fewest, sum(found[f"tiergate_worker_up{{worker={number}}}"] for number in range(WORKERS)))
            await asyncio.sleep(0.1)
        return fewest

    async with clients() as session:
        before = await metrics(session, service)
        async with asyncio.TaskGroup() as tasks:
            counting = tasks.create_task(fewest_up())
            arriving = [tasks.create_task(newcomers()) for _ in range(4)]
            running = [tasks.create_task(stream(session, service, 4 * TOKENS)) for _ in range(8)]
            kept = [tasks.create_task(_kept_open(service)) for _ in range(4)]
            await _arrived(session, service, before, 8)
            service.supervisor.signal(signal.SIGUSR2)
            await until(lambda: not set(service.workers()) & set(old))
            stop.set()
        assert all(whole(one.result(), 4 * TOKENS) for one in running)
        assert counting.result() == WORKERS, "a replacement serves before the old one leaves"
        heads = [head for one in kept for head in one.result()]
        assert {head.split()[1] for head in heads} == {b"200"}
        answers = [answer for one in arriving for answer in one.result()]
        assert len(answers) > 20
        assert [answer for answer in answers if not whole(answer, 2)] == []
        await _all_up(service)
        after = await metrics(session, service)
    gone = after["tiergate_requests_ended_total{end=finished}"]
    assert gone - before["tiergate_requests_ended_total{end=finished}"] == len(answers) + 8
    assert after["tiergate_worker_restarts_total{}"] == before["tiergate_worker_restarts_total{}"]


async def _kept_open(service: Service) -> list[bytes]:
    """Heads of answers on one connection, for as long as the gateway keeps it open."""
    heads: list[bytes] = []
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    while not heads or b"connection: close" not in heads[-1]:
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        heads.append((await reader.readuntil(b"\r\n\r\n")).lower())
        await reader.readexactly(len(b'{"status":"ok"}'))
        await asyncio.sleep(0.05)
    assert await reader.read() == b"", "it is closed after the answer that says so"
    writer.close()
    return heads


async def test_after_sighup_the_new_file_is_in_force_in_every_worker(service: Service) -> None:
    await _all_up(service)
    settings = orjson.loads(service.config.read_bytes())
    before = settings["tiers"]
    try:
        settings["tiers"] = [{**tier, "ttft_ms": tier["ttft_ms"] + 1} for tier in before]
        service.config.write_bytes(orjson.dumps(settings))
        service.supervisor.signal(signal.SIGHUP)
        async with clients() as session:

            async def everywhere() -> bool:
                found = [orjson.loads((await admin(session, service, "tiers"))[1])["tiers"] for _ in range(6)]
                return all(tiers[0]["ttft_ms"] == before[0]["ttft_ms"] + 1 for tiers in found)

            await until_told(everywhere)
    finally:
        settings["tiers"] = before
        service.config.write_bytes(orjson.dumps(settings))
        service.supervisor.signal(signal.SIGHUP)


async def test_sigterm_to_one_worker_replaces_it(service: Service) -> None:
    await _all_up(service)
    old = service.workers()
    async with clients() as session:
        before = await metrics(session, service)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream(session, service, TOKENS)) for _ in range(6)]
            await _arrived(session, service, before, 6)
            kill(old[0], signal.SIGTERM)
        assert all(whole(one.result(), TOKENS) for one in running)
        await until(lambda: old[0] not in service.workers())
        await _all_up(service)
    assert old[1] in service.workers()


async def test_the_embedded_store_is_started_again(service: Service) -> None:
    await _all_up(service)
    (server,) = service.stores()
    async with clients() as session:
        kill(server, signal.SIGKILL)
        # Nobody waits for the store, and nobody is refused for it.
        answers = [await stream(session, service, 2) for _ in range(5)]
        assert [answer for answer in answers if not whole(answer, 2)] == []

        async def shared_again() -> bool:
            found = await metrics(session, service)
            modes = [found.get(f"tiergate_store_mode{{mode=shared,worker={number}}}") for number in range(WORKERS)]
            return service.stores() not in ([], [server]) and modes == [1.0] * WORKERS

        await until_told(shared_again)
        assert whole(await stream(session, service, 2), 2)


# The last one of the shared service: it does not leave it as it was.
async def test_when_the_supervisor_is_killed_the_workers_finish_and_the_address_is_free(service: Service) -> None:
    await _all_up(service)
    workers, (watcher,) = service.workers(), service.watchers()
    async with clients() as session:
        before = await metrics(session, service)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream(session, service, 2 * TOKENS)) for _ in range(6)]
            await _arrived(session, service, before, 6)
            service.supervisor.signal(signal.SIGKILL)
            await until_told(lambda: _is(ready(session, service), 0))
            assert all(alive(pid) for pid in workers), "the workers still have streams"
        assert all(whole(one.result(), 2 * TOKENS) for one in running)
    await until(lambda: not any(alive(pid) for pid in (*workers, watcher)))


# --- services of their own -------------------------------------------------------------------------------------


async def test_sigterm_lets_streams_end_and_a_second_signal_does_not(tmp_path: Path) -> None:
    with serving(tmp_path / "one", "--workers", "2", "--store", "embedded") as service:
        (watcher,) = service.watchers()
        async with clients() as session:
            before = await metrics(session, service)
            async with asyncio.TaskGroup() as tasks:
                short = [tasks.create_task(stream(session, service, TOKENS)) for _ in range(4)]
                long = [tasks.create_task(stream(session, service, 3_000)) for _ in range(2)]
                await _arrived(session, service, before, 6)
                service.supervisor.signal(signal.SIGTERM)
                await until_told(lambda: _is(ready(session, service), 503))
                assert (await ask(session, service))[0] == 503
                await asyncio.wait(short)
                assert service.supervisor.poll() is None
                service.supervisor.signal(signal.SIGINT)
            assert all(whole(one.result(), TOKENS) for one in short)
            assert not any(whole(one.result(), 3_000) for one in long)
        await until(lambda: service.supervisor.poll() is not None)
        assert service.supervisor.poll() == 0
        assert not alive(watcher)


async def _is(told: object, wanted: int) -> bool:
    return bool(await told == wanted)  # type: ignore[misc]


def test_workers_that_cannot_live_are_given_up(tmp_path: Path) -> None:
    # Python runs this file in every process; it ends those that are workers.
    (tmp_path / "sitecustomize.py").write_text("import os\nif '_TIERGATE_WORKER' in os.environ: os._exit(7)\n")
    config = tmp_path / "tiergate.json"
    write_config(config, free_port(), [free_port()])
    done = subprocess.run(
        [*SERVE, "--config", str(config), "--workers", "2", "--store", "embedded"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "exit code 7" in done.stderr
    assert "the workers end before they serve" in done.stderr


def test_workers_without_a_store_are_refused() -> None:
    done = subprocess.run(
        [*SERVE, "--backend", "http://127.0.0.1:1", "--workers", "2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "--store embedded" in done.stderr
