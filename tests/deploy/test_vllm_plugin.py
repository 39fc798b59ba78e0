"""The plug-in that replaces vLLM's busy wait; tests/real_engine sees it work inside a real vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from deploy.vllm_cpu.plugin import tiergate_vllm_cpu as plugin


def _spin() -> None:
    raise AssertionError("the busy wait was called")


@pytest.fixture
def shm_broadcast(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty stand-in for vLLM's module."""
    names = ["vllm", "vllm.distributed", "vllm.distributed.device_communicators"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("shm_broadcast")
    monkeypatch.setattr(sys.modules[names[-1]], "shm_broadcast", module, raising=False)
    return module


def _wait_of(module: ModuleType) -> Callable[[], None]:
    wait: Callable[[], None] = module.__dict__["sched_yield"]
    return wait


def test_it_replaces_the_busy_wait(shm_broadcast: ModuleType) -> None:
    shm_broadcast.__dict__["sched_yield"] = _spin
    plugin.register()
    assert _wait_of(shm_broadcast) is not _spin
    _wait_of(shm_broadcast)()


def test_it_can_be_switched_off(shm_broadcast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shm_broadcast.__dict__["sched_yield"] = _spin
    monkeypatch.setenv(plugin.SWITCH, "1")
    plugin.register()
    assert _wait_of(shm_broadcast) is _spin


@pytest.mark.usefixtures("shm_broadcast")
def test_another_vllm_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no sched_yield to replace"):
        plugin.register()
