"""The store that is started with the workers."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import tempfile
from pathlib import Path

import pytest
import redis

from gateway.config import ConfigError, load
from tests.tiergate.workers.rig import alive, children, kill, until
from tiergate.commands import CommandFailed
from tiergate.root import checked
from tiergate.workers.embedded import EmbeddedStore


def test_without_its_package_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(None, {}, {"store.url": "embedded"})
    checked(settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tiergate\[embedded\]"):
        checked(settings)


@pytest.fixture
def store() -> EmbeddedStore:
    return EmbeddedStore()


async def test_it_answers_on_a_private_socket_and_leaves_nothing_behind(store: EmbeddedStore) -> None:
    await store.start()
    folder = Path(store.url.removeprefix("unix://")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    client = redis.Redis(unix_socket_path=store.url.removeprefix("unix://"))
    assert client.ping()
    assert client.config_get("port") == {"port": "0"}
    assert client.config_get("save") == {"save": ""}
    client.close()
    await store.stop()
    assert not folder.exists()


async def test_one_whose_watcher_is_killed_goes_on_with_all_that_it_holds(store: EmbeddedStore) -> None:
    await store.start()
    path = store.url.removeprefix("unix://")
    client = redis.Redis(unix_socket_path=path)
    client.set("kept", "yes")
    (watcher,) = children(os.getpid(), path)
    (server,) = children(watcher, "valkey-server")
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(store.keep())
        kill(watcher, signal.SIGKILL)
        await until(lambda: len(set(children(os.getpid(), path)) - {watcher}) == 1)
        await until(lambda: bool(client.ping()))
        assert client.get("kept") == b"yes"
        keeping.cancel()
    client.close()
    await store.stop()
    await until(lambda: not alive(server))


async def test_one_whose_watcher_was_killed_is_ended_all_the_same(store: EmbeddedStore) -> None:
    await store.start()
    path = store.url.removeprefix("unix://")
    (watcher,) = children(os.getpid(), path)
    (server,) = children(watcher, "valkey-server")
    kill(watcher, signal.SIGKILL)
    await store.stop()
    await until(lambda: not alive(server))


@pytest.fixture
def far_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EmbeddedStore:
    """One in a folder that is too deep: the path of a Unix socket has room for about a hundred bytes."""
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return EmbeddedStore()


async def test_a_store_that_cannot_start_is_an_error(far_store: EmbeddedStore) -> None:
    with pytest.raises(CommandFailed, match="did not start"):
        await far_store.start()
    await far_store.stop()
