"""The servers the tests run against: started, stopped, killed, paused, and gone when a test run dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from tests.servers import DataServer, Kind, Options, ServerFailed, make_certificates

ONCE = Retry(NoBackoff(), 0)
BOTH = pytest.mark.parametrize("kind", list(Kind))


def _gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@BOTH
async def test_a_server_starts_stops_and_comes_back_empty_on_its_port(kind: Kind, tmp_path: Path) -> None:
    async with DataServer(kind, tmp_path) as server:
        first = server.pid
        server.ask("SET", "key", "value")
        await server.restart()
        assert server.pid != first
        assert _gone(first)
        assert server.ask("GET", "key") is None
    assert "ready to accept connections" in server.log().lower()


@BOTH
async def test_what_is_kept_survives_a_kill(kind: Kind, tmp_path: Path) -> None:
    async with DataServer(kind, tmp_path, Options(appendonly=True)) as server:
        server.ask("SET", "key", "value")
        server.kill()
        await server.start()
        assert server.ask("GET", "key") == "value"


@BOTH
def test_a_paused_server_keeps_its_connections_and_answers_later(kind: Kind, tmp_path: Path) -> None:
    with (
        DataServer(kind, tmp_path) as server,
        redis.Redis(port=server.port, socket_timeout=0.2, retry=ONCE) as client,
    ):
        assert client.ping()
        server.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        server.resume()
        assert client.ping()
        client.close()


@BOTH
def test_passwords_sockets_memory_and_replicas(kind: Kind, tmp_path: Path) -> None:
    options = Options(password="secret", unix_socket=True, maxmemory="64mb", users=["one on >two ~a:* +@all"])
    with DataServer(kind, tmp_path / "primary", options) as server:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port, retry=ONCE).ping()
        with redis.Redis.from_url(server.unix_url) as client:
            assert client.ping()
        limited = redis.Redis.from_url(server.url_as("one", "two"))
        with limited as client, pytest.raises(NoPermissionError):
            client.get("b")
        assert server.ask("CONFIG", "GET", "maxmemory") == {"maxmemory": str(64 * 2**20)}
        with DataServer(kind, tmp_path / "r", Options(password="secret", replica_of=server.port)) as replica:
            server.ask("SET", "a:key", "value")
            while replica.ask("GET", "a:key") != "value":  # the test's own time limit ends this
                time.sleep(0.02)


def test_tls_with_and_without_a_clients_certificate(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    options = Options(tls=certificates, client_certificates=True)
    with DataServer(Kind.REDIS, tmp_path / "server", options) as server:
        assert server.ask("PING") is True
        with (
            redis.Redis.from_url(server.url, ssl_ca_certs=str(certificates.authority)) as client,
            pytest.raises(redis.ConnectionError),
        ):
            client.ping()


def test_a_server_dies_with_the_run_that_started_it(tmp_path: Path) -> None:
    """The run is killed outright, so nothing of it can clean up."""
    program = (
        "import pathlib, sys, time\n"
        "from tests.servers import DataServer, Kind\n"
        "server = DataServer(Kind.REDIS, pathlib.Path(sys.argv[1]))\n"
        "server.start_now()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert not _gone(pid)
        os.kill(run.pid, signal.SIGKILL)
    while not _gone(pid):  # the test's own time limit ends this
        time.sleep(0.02)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = DataServer(Kind.REDIS, tmp_path, Options(settings={"no-such-setting": "1"}))
    with pytest.raises(ServerFailed, match="Bad directive"):
        server.start_now()


def test_a_missing_redis_fails_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ServerFailed, match=r"deploy/redis/install\.py"):
        Kind.REDIS.program()


def test_the_shared_servers_are_what_they_say(redis_server: DataServer, valkey_server: DataServer) -> None:
    assert "redis_version" in str(redis_server.ask("INFO", "server"))
    assert "valkey" in str(valkey_server.ask("INFO", "server"))
