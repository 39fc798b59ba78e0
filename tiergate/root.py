"""The composition root: makes the parts of a gateway from its settings and puts them together."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from importlib.metadata import version
from random import Random

from pydantic import ValidationError

from gateway.app import Wiring
from gateway.config import ConfigError, Settings, StoreKind, StoreSettings, tier_set
from gateway.learning import Learned
from gateway.tokens import FileTokenizer, TokenCounter
from gateway.words import unknown
from profiles import ProfileError, load
from scheduling.dispatcher import Dispatcher
from scheduling.options import Options
from scheduling.policies import POLICIES, make
from state.contract import Store
from state.memory import MemoryState, MemoryStore
from tiergate.workers.embedded import check_embedded


def wire(settings: Settings, clock: Callable[[], float] = time.monotonic, worker: int | None = None) -> Wiring:
    """Everything a gateway needs, with no connection made yet. `clock` is its one clock, the event loop's;
    `worker` is which of several processes this is. Raises ConfigError."""
    dispatcher = make_dispatcher(settings)
    check_profiles(settings)
    counter = TokenCounter(
        settings.tokens, {model: FileTokenizer(path) for model, path in settings.tokens.tokenizers.items()}
    )
    try:
        learned = Learned(counter, settings.learned_state)
    except (OSError, ValidationError, ProfileError) as error:
        raise ConfigError(f"learned_state: {settings.learned_state}: {error}") from None
    store = make_store(settings.store, clock, replica_name(worker))
    return Wiring(dispatcher, store, learned, counter, version("tiergate"), clock=clock)


def checked(settings: Settings) -> None:
    """Raises ConfigError for what would keep a gateway with these settings from starting."""
    if settings.store.kind is StoreKind.EMBEDDED:
        check_embedded()
        # Which address it will have is not known before it is started.
        settings = settings.model_copy(update={"store": StoreSettings()})
    wire(settings)


def make_store(settings: StoreSettings, clock: Callable[[], float], replica: str) -> Store:
    """The store as it is configured; `replica` is this process's name in it. Raises ConfigError."""
    if settings.kind is StoreKind.MEMORY:
        return MemoryStore(MemoryState(clock), replica)
    raise ConfigError(f"store.url: this build has no {settings.kind.value} store")


def replica_name(worker: int | None) -> str:
    """A name that no other process has, and none will have after it: readable, and random at its end."""
    which = "" if worker is None else f"-w{worker}"
    return f"{socket.gethostname()}-{os.getpid()}{which}-{secrets.token_hex(4)}"


def make_dispatcher(settings: Settings) -> Dispatcher:
    """The core with the configured policy. Raises ConfigError for a name or an option that is not there."""
    name = settings.policy.name
    if name not in POLICIES:
        raise ConfigError(f"policy.name: {unknown('policy', name, sorted(POLICIES))}")
    known = list(Options.__dataclass_fields__)
    defaults = Options()
    values: dict[str, float | int | bool] = {}
    for option, value in settings.policy.options.items():
        if option not in known:
            raise ConfigError(f"policy.options: {unknown('option', option, known)}")
        default = getattr(defaults, option)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise ConfigError(f"policy.options.{option}: must be true or false, not {value!r}")
            values[option] = value
            continue
        if isinstance(value, bool | str) or value < 0:
            raise ConfigError(f"policy.options.{option}: must be a number of at least 0, not {value!r}")
        values[option] = int(value) if isinstance(default, int) else float(value)
    # Each value was checked against the field's own type above, which no type checker can follow.
    return Dispatcher(tier_set(settings), make(name, Random(settings.seed)), Options(**values))  # type: ignore[arg-type]


def check_profiles(settings: Settings) -> None:
    """Load every named profile once, so a wrong name is told before anything listens. Raises ConfigError."""
    for backend in settings.backends:
        if backend.profile is not None:
            try:
                load(backend.profile)
            except ProfileError as error:
                raise ConfigError(f"backend {backend.name}: profile: {error}") from None
