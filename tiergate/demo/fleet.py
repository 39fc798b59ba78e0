"""Engines, and a gateway with a policy in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import yaml

from tiergate.commands import CommandFailed
from tiergate.demo.processes import ready, tiergate
from tiergate.demo.sizes import Size
from tiergate.ports import free_ports

MODEL = "demo"

# Shorter than the defaults, because a demo lasts a minute: see scheduling.options.
_POLICY_OPTIONS = {"handback_period_s": 2.0, "rebalance_period_s": 5.0}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway that serves; `state` reads what it tells its operator."""

    url: str
    token: str
    http: aiohttp.ClientSession

    async def state(self) -> dict[str, object]:
        headers = {"authorization": f"Bearer {self.token}"}
        try:
            async with self.http.get(f"{self.url}/admin/v1/state", headers=headers) as answer:
                answer.raise_for_status()
                state: dict[str, object] = await answer.json()
                return state
        except aiohttp.ClientError as error:
            raise CommandFailed(f"{self.url}: the gateway does not tell its state: {error}") from error


@contextlib.asynccontextmanager
async def emulated_engines(
    size: Size, http: aiohttp.ClientSession, work: Path, name: str
) -> AsyncIterator[list[str]]:
    """Base URLs of fresh emulated engines, all in one process."""
    ports = free_ports(size.backends)
    log = work / f"engines-{name}.log"
    arguments = ["emulate", "--profile", str(size.profile), "--model", MODEL]
    arguments += ["--ports", ",".join(map(str, ports)), "--max-num-batched-tokens", str(size.chunk_tokens)]
    async with tiergate(arguments, log) as process:
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            await ready(http, f"{url}/health", process, log)
        yield urls


@contextlib.asynccontextmanager
async def gateway(
    size: Size,
    policy: str,
    engines: Sequence[str],
    profile: str,
    http: aiohttp.ClientSession,
    work: Path,
    name: str,
) -> AsyncIterator[Gateway]:
    """A gateway on the memory store, with every backend in the pool."""
    port = free_ports(1)[0]
    token = secrets.token_urlsafe(16)
    config = work / f"gateway-{name}.yaml"
    written = yaml.safe_dump(settings(size, policy, engines, profile, port, token))
    await asyncio.to_thread(_write_secret, config, written)
    log = work / f"gateway-{name}.log"
    async with tiergate(["serve", "--config", str(config)], log) as process:
        url = f"http://127.0.0.1:{port}"
        await ready(http, f"{url}/readyz", process, log)
        yield Gateway(url, token, http)


def settings(
    size: Size, policy: str, engines: Sequence[str], profile: str, port: int, token: str
) -> dict[str, object]:
    """The configuration file of such a gateway."""
    return {
        "port": port,
        "admin_token": token,
        "log_requests": False,
        "default_tier": size.tiers[-1].name,
        "tiers": [{"name": tier.name, "ttft_ms": tier.ttft_ms, "tpot_ms": tier.tpot_ms} for tier in size.tiers],
        "policy": {"name": policy, "options": _POLICY_OPTIONS},
        "backends": [
            {
                "name": f"engine-{number}",
                "url": url,
                "profile": profile,
                "limits": {"max_batched_tokens": size.chunk_tokens},
            }
            for number, url in enumerate(engines, 1)
        ],
    }


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")
