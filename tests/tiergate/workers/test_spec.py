"""What a worker is told when it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiergate import cli
from tiergate.commands.serve import settings_of
from tiergate.workers.spec import VARIABLE, WorkerSpec, arguments_of

_LINE = [
    "serve",
    "--config",
    "tiergate.yaml",
    "--backend",
    "http://a:1",
    "--backend",
    "http://b:2",
    "--workers",
    "3",
]


def _spec(store_url: str) -> WorkerSpec:
    return WorkerSpec(arguments_of(cli.parse(_LINE), store_url), True, 1, 4, 12, 7, 8, (9, 10))


def test_it_is_read_as_it_was_written_and_taken_out() -> None:
    environment = {"OTHER": "1", **_spec("redis://:secret@h").environment()}
    assert WorkerSpec.take(environment) == _spec("redis://:secret@h")
    assert environment == {"OTHER": "1"}, "what the worker starts has no use for it"


def test_the_worker_has_the_command_line_and_the_store_of_all(tmp_path: Path) -> None:
    file = tmp_path / "tiergate.yaml"
    file.write_text("store: {url: embedded, fleet: eu}")
    args = cli.parse([word.replace("tiergate.yaml", str(file)) for word in _LINE])
    spec = WorkerSpec(arguments_of(args, "unix:///run/store.sock"), False, 1, 4, 12, 7, 8, (9,))
    settings = settings_of(WorkerSpec.take(spec.environment()).namespace())
    assert [backend.name for backend in settings.backends] == ["a:1", "b:2"]
    assert settings.store.url.get_secret_value() == "unix:///run/store.sock"
    assert (settings.store.fleet, settings.workers) == ("eu", 3)


def test_another_process_is_no_worker() -> None:
    with pytest.raises(KeyError, match=VARIABLE):
        WorkerSpec.take({"OTHER": "1"})
