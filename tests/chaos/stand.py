"""The stand: a store, emulated engines and gateways, each a process of its own on a loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from deploy.server_process import free_port
from scheduling.tiers import Slo
from tests.chaos.process import Actor, Process
from tests.servers import DataServer, Kind, Options
from workloads.mix import TierMix, TierShare

PROFILE = "h100-llama-3.1-8b-fp8"
MODEL = "chaos-model"
ADMIN_TOKEN = "chaos"
FLEET = "chaos"
_TIERGATE = (sys.executable, "-m", "tiergate")
# Engines are slowed down so that few tokens, hence little of this machine, keep them busy.
_HOST_STEP_MS = 20.0
# Ten processes on two cores wait for each other; a store that is only late must not look like one that is gone.
_STORE_TIMEOUT_MS = 500

MIX = TierMix(
    (
        TierShare("quick", Slo(2.0, 0.06), 0.3),
        TierShare("chat", Slo(4.0, 0.1), 0.4),
        TierShare("slow", Slo(8.0, 0.2), 0.2),
        TierShare("batch", Slo(None, None), 0.1),
    )
)


@dataclass(frozen=True, slots=True)
class Size:
    """How large the stand is.

    Attributes:
        cap: most sequences that all gateways together may have on one engine; the engines themselves take more,
            so that going beyond shows.
        lease_s: the store's lease time.
        persistent: the store keeps its writes over a restart; else it comes back empty.
        shared: gateways share a Redis; else there is one gateway, with its own memory.
    """

    gateways: int = 3
    engines: int = 4
    cap: int = 6
    lease_s: float = 2.0
    persistent: bool = False
    shared: bool = True


class StoreServer:
    """The Redis as an `Actor`."""

    name = "redis"

    def __init__(self, server: DataServer) -> None:
        self.server = server

    async def start(self) -> None:
        await self.server.start()

    def kill(self) -> None:
        self.server.kill()

    def pause(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()


@dataclass(frozen=True, slots=True)
class Stand:
    """Everything that runs. `mark`: see `Process`."""

    size: Size
    folder: Path
    mark: str
    config: Path
    store: StoreServer | None
    engines: Mapping[str, Process]
    engine_ports: Mapping[str, int]
    gateways: Mapping[str, Process]
    gateway_ports: Mapping[str, int]

    @property
    def actors(self) -> Mapping[str, Actor]:
        """Everything that faults may happen to, by name."""
        actors: dict[str, Actor] = {**self.engines, **self.gateways}
        if self.store is not None:
            actors[self.store.name] = self.store
        return actors

    def urls(self) -> list[tuple[str, str]]:
        """Every gateway and its base URL."""
        return [(name, f"http://127.0.0.1:{port}/v1") for name, port in self.gateway_ports.items()]

    def journal(self, engine: str) -> Path:
        return self.folder / f"{engine}.journal"

    def request_log(self, gateway: str) -> Path:
        return self.folder / f"{gateway}.requests"


@contextlib.asynccontextmanager
async def standing(size: Size, folder: Path) -> AsyncIterator[Stand]:
    """A stand that serves. On the way out everything is stopped, gateways in good order first."""
    mark = secrets.token_hex(8)
    async with contextlib.AsyncExitStack() as stack:
        store = None
        if size.shared:
            options = Options(appendonly=size.persistent)
            store = StoreServer(await stack.enter_async_context(DataServer(Kind.REDIS, folder / "redis", options)))
        stand = _lay_out(size, folder, mark, store)
        for group in (stand.engines, stand.gateways):
            for process in group.values():
                stack.push_async_callback(process.stop)
            await asyncio.gather(*(process.start() for process in group.values()))
        yield stand


def _lay_out(size: Size, folder: Path, mark: str, store: StoreServer | None) -> Stand:
    engine_ports = {f"engine{number}": free_port() for number in range(size.engines)}
    gateway_ports = {f"gateway{number}": free_port() for number in range(size.gateways if size.shared else 1)}
    config = folder / "tiergate.json"
    stand = Stand(size, folder, mark, config, store, {}, engine_ports, {}, gateway_ports)
    config.write_bytes(orjson.dumps(_settings(stand)))
    engines = {name: _engine(stand, name, port) for name, port in engine_ports.items()}
    gateways = {name: _gateway(stand, name, port) for name, port in gateway_ports.items()}
    return Stand(size, folder, mark, config, store, engines, engine_ports, gateways, gateway_ports)


def _settings(stand: Stand) -> dict[str, object]:
    size = stand.size
    settings: dict[str, object] = {
        "backends": [
            {
                "url": f"http://127.0.0.1:{port}",
                "name": name,
                "profile": PROFILE,
                "limits": {"max_running_seqs": size.cap},
            }
            for name, port in stand.engine_ports.items()
        ],
        "tiers": [
            {
                "name": share.name,
                "ttft_ms": None if share.slo.ttft_s is None else share.slo.ttft_s * 1e3,
                "tpot_ms": None if share.slo.tpot_s is None else share.slo.tpot_s * 1e3,
                "on_miss": "refuse" if share.slo.tpot_s is not None else "relegate",
            }
            for share in MIX.shares
        ],
        "default_tier": "chat",
        "admin_token": ADMIN_TOKEN,
        "health": {"every_s": 0.5},
        "drain_grace_s": 5,
        "log_requests": False,
    }
    if stand.store is not None:
        settings["store"] = {
            "url": stand.store.server.url,
            "fleet": FLEET,
            "lease_s": size.lease_s,
            "timeout_ms": _STORE_TIMEOUT_MS,
        }
    return settings


def _engine(stand: Stand, name: str, port: int) -> Process:
    command = [*_TIERGATE, "emulate", "--profile", PROFILE, "--model", MODEL, "--port", str(port)]
    command += ["--max-num-seqs", "256", "--host-step-ms", str(_HOST_STEP_MS), "--grace-s", "0"]
    command += ["--scheduling-policy", "priority", "--journal", str(stand.journal(name))]
    url = f"http://127.0.0.1:{port}/health"
    return Process(name, command, url, stand.folder / f"{name}.log", stand.mark)


def _gateway(stand: Stand, name: str, port: int) -> Process:
    command = [*_TIERGATE, "serve", "--config", str(stand.config), "--port", str(port)]
    command = ["env", f"TIERGATE_REQUEST_LOG={stand.request_log(name)}", *command]
    url = f"http://127.0.0.1:{port}/readyz"
    return Process(name, command, url, stand.folder / f"{name}.log", stand.mark)
