"""The composition root: makes the parts of a gateway from its settings and puts them together."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from random import Random

from pydantic import ValidationError

from gateway.app import Wiring, nothing_to_close
from gateway.carried import Place
from gateway.config import ConfigError, Settings, StoreKind, StoreSettings, tier_set
from gateway.learning import Learned
from gateway.shared import PolicySource, begin
from gateway.sharing import Sharing
from gateway.telemetry import log_mode
from gateway.tokens import FileTokenizer, TokenCounter
from gateway.words import unknown
from profiles import ProfileError, load
from scheduling.dispatcher import Dispatcher
from scheduling.options import Options
from scheduling.policies import POLICIES, make
from state.contract import Store
from state.documents import Documents, MemoryDocuments
from state.memory import MemoryState, MemoryStore
from state.outage import Shelter
from state.redis.address import Address, BadStoreUrl, parse_url
from state.redis.connect import ConnectOptions, connect
from state.redis.directory import Directory
from state.redis.documents import RedisDocuments
from state.redis.store import RedisStore, StoreOptions
from state.sheltered import Sheltered
from tiergate.workers.embedded import check_embedded


@dataclass(frozen=True, slots=True)
class Incarnation:
    """Which process this is.

    Attributes:
        replica: its name in the store, which no other process has or will have.
        adopt_file: its file goes into the store at the start, whatever the store has.
        saves: it saves what was learned; of several workers one does.
    """

    replica: str
    adopt_file: bool = False
    saves: bool = True

    @classmethod
    def of(cls, worker: int | None = None, *, adopt_file: bool = False) -> Incarnation:
        """This process: readable, and random at its end. `worker` is which of several it is."""
        which = "" if worker is None else f"-w{worker}"
        return cls(
            f"{socket.gethostname()}-{os.getpid()}{which}-{secrets.token_hex(4)}", adopt_file, worker in {None, 0}
        )


@dataclass(frozen=True, slots=True)
class SharedState:
    """What replicas share. `close` ends the connection that the others use, after they were closed."""

    store: Callable[[Dispatcher], Store]
    documents: Documents
    close: Callable[[], Awaitable[None]]
    directory: Directory | None = None


def wire(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Wiring:
    """Everything a gateway needs that shares nothing. `clock` is its one clock, the event loop's. Raises
    ConfigError."""
    dispatcher = make_dispatcher(settings)
    check_profiles(settings)
    return _parts(settings, dispatcher, MemoryStore(MemoryState(clock)), _learned(settings), clock)


async def assemble(settings: Settings, which: Incarnation, clock: Callable[[], float] = time.monotonic) -> Wiring:
    """Everything a gateway needs, on the configured store and with the policy that the fleet has there. In the
    event loop that it will run in; a store that does not answer is waited for two seconds. Raises ConfigError."""
    await asyncio.to_thread(checked_store, settings.store)
    shared = connect_state(settings.store, which.replica, clock, settings.workers)
    source = PolicySource(shared.documents, check_served, which.replica, which.adopt_file)
    begun = await begin(settings, source)
    if begun.document is None and not begun.settings.backends:
        await shared.close()
        raise ConfigError(
            "no backend: the configuration names none, and the store has no policy that can be used here: give "
            "--backend http://host:port, or `backends` in a configuration file"
        )
    dispatcher = make_dispatcher(begun.settings)
    await asyncio.to_thread(check_profiles, begun.settings)
    learned = await asyncio.to_thread(_learned, begun.settings, saves=which.saves)
    made = _parts(begun.settings, dispatcher, shared.store(dispatcher), learned, clock)
    alone = settings.store.kind is StoreKind.MEMORY
    sharing = None if alone else Sharing(shared.documents, learned)
    made = replace(made, policy=source, begun=begun, sharing=sharing, close=shared.close)
    if shared.directory is None:
        return made
    place = Place(which.replica, settings.store.fleet, settings.store.lease_s)
    host = await asyncio.to_thread(reachable_host, settings.host)
    return replace(made, place=place, keep_address=partial(_keep_address, shared.directory, host))


async def _keep_address(directory: Directory, host: str, port: Callable[[], int]) -> None:
    await directory.keep(lambda: f"http://{host}:{port()}" if port() else None)


def reachable_host(host: str) -> str:
    """The name under which a socket that is bound to `host` is reached from other machines, as far as this one
    knows: where it listens on every address, the one that its own name has. May ask a name server."""
    if host not in {"", "0.0.0.0", "::"}:  # noqa: S104 -- compared with, not bound to
        return f"[{host}]" if ":" in host else host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return socket.gethostname()


def checked(settings: Settings) -> None:
    """Raises ConfigError for what would keep a gateway with these settings from starting. Asks nobody."""
    checked_store(settings.store)
    wire(settings)


def checked_store(settings: StoreSettings) -> None:
    """The part of `checked` about the store and the files that its URL names. Blocking. Raises ConfigError."""
    if settings.kind is StoreKind.EMBEDDED:
        check_embedded()
    elif settings.kind is StoreKind.REDIS:
        try:
            store_address(settings).check_files()
        except BadStoreUrl as error:
            raise _bad_url(error) from None


def check_served(settings: Settings) -> None:
    """Whether a policy, wherever it comes from, can be served here. Raises ConfigError."""
    make_dispatcher(settings)
    check_profiles(settings)


def _learned(settings: Settings, *, saves: bool = True) -> Learned:
    """Raises ConfigError."""
    counter = TokenCounter(
        settings.tokens, {model: FileTokenizer(path) for model, path in settings.tokens.tokenizers.items()}
    )
    try:
        return Learned(counter, settings.learned_state, owns_file=saves)
    except (OSError, ValidationError, ProfileError) as error:
        raise ConfigError(f"learned_state: {settings.learned_state}: {error}") from None


def _parts(
    settings: Settings, dispatcher: Dispatcher, store: Store, learned: Learned, clock: Callable[[], float]
) -> Wiring:
    return Wiring(dispatcher, store, learned, learned.counter, version("tiergate"), clock=clock)


def connect_state(
    settings: StoreSettings, replica: str, clock: Callable[[], float], workers: int = 1
) -> SharedState:
    """What is configured under `store`, with no connection made yet; in the event loop that will use it.
    `workers`: how many replicas there are at least. Raises ConfigError."""
    if settings.kind is StoreKind.MEMORY:
        state = MemoryState(clock)
        return SharedState(lambda _: state.replica(replica), MemoryDocuments(), nothing_to_close)
    if settings.kind is StoreKind.EMBEDDED:
        raise ConfigError("store.url: `embedded` is for `tiergate serve`, which starts the store with its workers")
    timeout_s = settings.timeout_ms / 1e3
    connection = connect(store_address(settings), ConnectOptions(client_name=f"tiergate-{replica}"))

    def store(dispatcher: Dispatcher) -> Store:
        def most_sequences(backend: str) -> int | None:
            ledger = dispatcher.fleet.get(backend)
            return None if ledger is None else ledger.backend.limits.max_running_seqs

        inner = RedisStore(
            connection, settings.fleet, replica, StoreOptions(lease_s=settings.lease_s, timeout_s=timeout_s), clock
        )
        # The store's own limit ends a call in good order; the shelter's is for what slips through.
        shelter = Shelter(deadline_s=1.2 * timeout_s, lease_s=settings.lease_s, least_replicas=workers)
        return Sheltered(inner, clock, shelter, caps=most_sequences, on_mode=log_mode)

    directory = Directory(connection, settings.fleet, replica, settings.lease_s)
    return SharedState(store, RedisDocuments(connection, settings.fleet), connection.close, directory)


def store_address(settings: StoreSettings) -> Address:
    """Where the store is, when it is a Redis. Raises ConfigError."""
    try:
        return parse_url(settings.url.get_secret_value())
    except BadStoreUrl as error:
        raise _bad_url(error) from None


def _bad_url(error: BadStoreUrl) -> ConfigError:
    return ConfigError(str(error).replace("store URL:", "store.url:", 1))


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
    named = {backend.profile: backend.name for backend in settings.backends if backend.profile is not None}
    for profile, backend in named.items():
        try:
            load(profile)
        except ProfileError as error:
            raise ConfigError(f"backend {backend}: profile: {error}") from None
