"""The container files agree with themselves and with the command line; no container engine is needed for that."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path
from typing import TypedDict, cast

import pytest
import yaml

from gateway.config import StoreKind
from profiles.catalogue import shipped
from state.redis.address import parse_url
from tiergate import cli
from tiergate.commands.serve import settings_of

ROOT = Path(__file__).resolve().parent.parent


class Service(TypedDict, total=False):
    image: str
    build: str
    command: list[str]
    expose: list[str]
    ports: list[str]
    depends_on: dict[str, dict[str, str]]
    healthcheck: dict[str, object]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return cast("dict[str, Service]", document["services"])


def _option(arguments: list[str], name: str) -> list[str]:
    """Values of an option, written `--name=value` or `--name value`."""
    values = [word.partition("=")[2] for word in arguments if word.startswith(f"{name}=")]
    return values + [after for word, after in itertools.pairwise(arguments) if word == name]


def _ours(services: dict[str, Service]) -> dict[str, Service]:
    return {name: service for name, service in services.items() if "build" in service}


def test_it_is_a_gateway_a_store_and_two_engines(services: dict[str, Service]) -> None:
    commands = sorted(service["command"][0] for service in services.values())
    assert commands == ["emulate", "emulate", "redis-server", "serve"]


def test_our_commands_are_ones_the_command_line_takes(services: dict[str, Service]) -> None:
    for name, service in _ours(services).items():
        args = cli.parse(service["command"])
        assert args.command == service["command"][0], name
        assert args.host == "0.0.0.0", f"{name} would answer inside its own container only"


def test_engines_run_profiles_that_are_shipped(services: dict[str, Service]) -> None:
    wanted = {value for service in services.values() for value in _option(service["command"], "--profile")}
    assert wanted
    assert wanted <= set(shipped())


def test_ports_agree(services: dict[str, Service]) -> None:
    for name, service in _ours(services).items():
        (port,) = _option(service["command"], "--port")
        outside = [mapping.rpartition(":")[2] for mapping in service.get("ports", [])]
        assert port in [*service.get("expose", []), *outside], name
        assert f":{port}/" in str(service["healthcheck"]["test"]), name


def test_the_gateway_reaches_every_engine(services: dict[str, Service]) -> None:
    engines = {
        f"http://{name}:{_option(service['command'], '--port')[0]}"
        for name, service in services.items()
        if service["command"][0] == "emulate"
    }
    assert set(_option(services["gateway"]["command"], "--backend")) == engines
    waits_for = set(services["gateway"]["depends_on"])
    assert {f"http://{name}:8000" for name in waits_for - {"redis"}} == engines


def test_the_gateway_shares_its_state_on_the_redis_beside_it(services: dict[str, Service]) -> None:
    args = cli.parse(services["gateway"]["command"])
    settings = settings_of(args)
    assert settings.store.kind is StoreKind.REDIS
    (host,) = parse_url(settings.store.url.get_secret_value()).hosts
    assert host.name in services["gateway"]["depends_on"]
    assert [str(host.port)] == services[host.name]["expose"]
    assert settings.workers > 1


def test_everything_has_a_health_check_and_a_pinned_image(services: dict[str, Service]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert re.search(r":\d+\.\d+\.\d+", service["image"]), f"{name}: {service['image']} is no exact version"
        if "build" in service:
            assert service["image"] == f"tiergate:{version}"


def test_the_image_is_pinned_complete_and_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-bookworm", bases[0])
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] not in {"root", "0"}
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    copied = {line.split()[1] for line in lines if line.startswith("COPY") and len(line.split()) == 3}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for package in packaged:
        assert package.partition("/")[0] in copied & allowed
