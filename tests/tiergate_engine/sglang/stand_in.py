"""A made-up stand-in for the parts of SGLang that the plug-in touches. It is not SGLang, and no model is in it.

Written after the source of 0.5.12 to 0.5.23: how hooks are registered and put on (`srt/plugins/hook_registry.py`),
and how a scheduler takes settings and tells its state (`srt/managers/scheduler.py`).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import pytest

# Hooks wrap whatever function they are put on.
Function = Callable[..., Any]


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Names of functions, and what is put around them."""

    hooks: ClassVar[list[tuple[str, Function, HookType]]] = []

    @classmethod
    def register(cls, target: str, hook: Function, hook_type: HookType = HookType.AFTER) -> None:
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook, hook_type in cls.hooks:
            place, name = target.rsplit(".", 1)
            module, owner_name = place.rsplit(".", 1)
            owner = getattr(importlib.import_module(module), owner_name)
            setattr(owner, name, _wrapped(getattr(owner, name), hook, hook_type))


def _wrapped(original: Function, hook: Function, hook_type: HookType) -> Function:
    if hook_type is HookType.AROUND:
        return lambda *args: hook(original, *args)
    assert hook_type is HookType.AFTER

    def after(*args: object) -> object:
        result = original(*args)
        changed = hook(result, *args)
        return result if changed is None else changed

    return after


@dataclass(slots=True)
class SetRequest:
    server_args: dict[str, object]
    rid: str | None = None


@dataclass(slots=True)
class SetAnswer:
    updated: bool


@dataclass(slots=True)
class StateAnswer:
    internal_state: dict[str, object]


@dataclass
class Scheduler:
    """What a scheduler reads and takes. `says_true`: it answers as 0.5.12 does."""

    chunked_prefill_size: int | None = 2048
    page_size: int = 16
    truncation_align_size: int | None = None
    max_running_requests: int = 64
    says_true: bool = False
    settings: dict[str, object] = field(default_factory=lambda: {"pp_max_micro_batch_size": 64})
    dynamic_chunk_sizer: object | None = None
    is_mixed_chunk: bool = False
    prefill_decode_interval: int | None = 0  # None: a version before 0.5.20, which has it not

    def set_internal_state(self, request: SetRequest) -> SetAnswer:
        for name, value in request.server_args.items():
            known = name == "pp_max_micro_batch_size" and isinstance(value, int)
            if not known or not 1 <= int(str(value)) <= self.max_running_requests:
                return SetAnswer(self.says_true)
        self.settings.update(request.server_args)
        return SetAnswer(True)

    def get_internal_state(self, request: object) -> StateAnswer:
        return StateAnswer(dict(self.settings))

    def next_chunk(self, waiting_tokens: int) -> int:
        """What the next batch takes of a prompt: it looks at its size anew each time."""
        return (
            waiting_tokens if self.chunked_prefill_size is None else min(waiting_tokens, self.chunked_prefill_size)
        )


def install(patch: pytest.MonkeyPatch, version: str) -> type[Scheduler]:
    """Make `import sglang...` find the stand-in, and `importlib.metadata` that version; its scheduler's class."""
    scheduler = type("Scheduler", (Scheduler,), {})  # a class of its own, which hooks may change
    registry = type("HookRegistry", (HookRegistry,), {"hooks": []})
    parts: dict[str, dict[str, object]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": registry, "HookType": HookType},
        "sglang.srt.managers": {},
        "sglang.srt.managers.scheduler": {"Scheduler": scheduler},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
    patch.setattr("importlib.metadata.version", lambda name: {"sglang": version}[name])
    return scheduler


def load_plugins(register: Callable[[], None]) -> None:
    """What each process of SGLang does at its start."""
    register()
    vars(sys.modules["sglang.srt.plugins.hook_registry"])["HookRegistry"].apply_hooks()
