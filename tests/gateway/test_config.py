"""Configuration: file, environment and flags; every mistake with its place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import ConfigError, EngineKind, Settings, StoreKind, load, parse_backend_flag, tier_set
from tiergate.root import make_dispatcher, wire

_FILE = """
port: 9000
default_tier: slow
tiers:
  - {name: quick, ttft_ms: 500, tpot_ms: 30}
  - {name: slow, tpot_ms: 90, ttft_ms: 4000, on_miss: relegate}
backends:
  - {url: "http://a:8000/v1", name: a, tier: quick, pinned: true}
  - http://b:8000,profile=h200-llama-3.1-8b-fp8,max_running_seqs=7
policy: {name: least_load, options: {max_attempts: 2}}
keys: [{key: k1, tenant: t1, tier: slow}]
"""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tiergate.yaml"
    path.write_text(text)
    return path


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    path = _file(tmp_path, _FILE)
    environment = {"TIERGATE_PORT": "9001", "TIERGATE_POLICY__NAME": "random", "TIERGATE_LIMITS__BODY_BYTES": "99"}
    settings = load(path, environment | {"OTHER": "1"}, {"port": 9002, "host": None})
    assert settings.port == 9002
    assert settings.policy.name == "random"
    assert settings.policy.options == {"max_attempts": 2}
    assert settings.limits.body_bytes == 99
    assert [backend.name for backend in settings.backends] == ["a", "b:8000"]
    assert settings.backends[0].url == "http://a:8000"
    assert settings.backends[1].limits.max_running_seqs == 7
    tiers = tier_set(settings)
    assert tiers.default == "slow"
    assert tiers["quick"].slo.tpot_s == 0.03
    assert make_dispatcher(settings).options.max_attempts == 2


def test_nothing_given_is_a_configuration_too() -> None:
    settings = load(None, {})
    assert settings == Settings()
    assert [tier.name for tier in settings.tiers] == ["fast", "chat", "summary", "batch"]
    assert wire(settings).dispatcher.policy.name == "polyserve"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean 'port'"),
        ("limits: {body_byte: 1}", "limits: unknown key 'body_byte'; did you mean 'body_bytes'"),
        ("tiers: [{name: a, tpot: 3}]", "tiers.0: unknown key 'tpot'; did you mean 'tpot_ms'"),
        ("backends: [{url: 'http://a', profil: x}]", "backends.0: unknown key 'profil'; did you mean 'profile'"),
        ("backends: [{url: 'ftp://a'}]", "backends.0.url: must look like http://host:port"),
        ("backends: ['http://a', 'http://a']", "the names ['a'] are used twice"),
        ("backends: ['http://a,tier=bach']", "unknown tier 'bach'; did you mean 'batch'"),
        ("backends: [{url: 'http://a', pinned: true}]", "a pinned backend needs `tier`"),
        ("port: eighty", "port:"),
        ("port: 70000", "port:"),
        ("tiers: [{name: a, tpot_ms: .nan}]", "tiers.0.tpot_ms"),
        ("tiers: [{name: a, tpot_ms: -1}]", "tiers.0.tpot_ms"),
        ("tiers: [{name: a, tpot_ms: 9}, {name: b, tpot_ms: 5}]\ndefault_tier: a", "must not fall"),
        ("default_tier: none", "default tier 'none' is not one of"),
        ("keys: [{key: x, tenant: t, tier: nope}]", "key of t: unknown tier 'nope'"),
        ("workers: 2", "--store embedded"),
        ("workers: 2\nstore: {url: memory}", "need a store that they share"),
        ("workers: 0", "workers:"),
        ("store: {url: redis}", "store.url: must be memory, embedded, or a URL"),
        ("store: {ulr: memory}", "store: unknown key 'ulr'; did you mean 'url'"),
        ("store: {lease_s: 0.1}", "store.lease_s"),
        ("- a", "must hold keys and values"),
        ("a: [", "not YAML"),
        ("a: 2026-99-99", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("backends: ['http://a:99999']", "backends.0.url: must look like http://host:port: Port out of range"),
        ("backends: ['http://a:0']", "backends.0.url: must look like"),
        ("backends: ['http://a:80a']", "backends.0.url: must look like"),
        ("backends: ['http://[::1']", "backends.0.url: must look like"),
        ("backends: ['http://a b:80']", "without spaces"),
        ("backends: ['http://a:80?x=1']", "must not have a query"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(_file(tmp_path, text), {})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"policy": {"name": "polyserv"}}, "did you mean 'polyserve'"),
        ({"policy": {"options": {"max_attemts": 2}}}, "did you mean 'max_attempts'"),
        ({"policy": {"options": {"max_attempts": "two"}}}, "must be a number"),
        ({"policy": {"options": {"refuses": 1}}}, "must be true or false"),
        ({"backends": ["http://a,profile=h200"]}, "backend a: profile"),
        ({"tokens": {"tokenizers": {"m": "/nowhere/tokenizer.json"}}}, "tokens.tokenizers"),
    ],
)
def test_names_that_are_not_there(more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wire(load(None, {}, more))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "tiergate.yaml"
    path.write_bytes(b"port: 1\n\xff\xfe\0")
    with pytest.raises(ConfigError, match="not a text in UTF-8: invalid start byte at byte 8"):
        load(path, {})


def test_a_long_name_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as raised:
        load(None, {}, {"ab" * 500_000: 1})
    assert len(str(raised.value)) < 1_000


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "no.yaml", {})


def test_backend_flags() -> None:
    made = parse_backend_flag("http://h:1,profile=p,model=a,model=b,kv_tokens=5,engine=vllm,name=x")
    settings = load(None, {}, {"backends": [made]}).backends[0]
    assert settings.models == ("a", "b")
    assert settings.limits.kv_tokens == 5
    assert settings.engine is EngineKind.VLLM
    for wrong in ("http://h,profile", "http://h,profile=", "http://h,colour=red"):
        with pytest.raises(ConfigError, match="--backend"):
            parse_backend_flag(wrong)


def test_a_flag_changes_one_key_of_the_store(tmp_path: Path) -> None:
    path = _file(tmp_path, "store: {url: memory, fleet: eu, lease_s: 5}")
    environment = {"TIERGATE_STORE__URL": "redis://one:6379", "TIERGATE_STORE__LEASE_S": "7"}
    settings = load(path, environment, {"store.url": "redis://:secret@two:6379/1", "workers": 2})
    store = settings.store
    assert (store.kind, store.fleet, store.lease_s) == (StoreKind.REDIS, "eu", 7)
    assert store.url.get_secret_value() == "redis://:secret@two:6379/1"
    assert "secret" not in repr(settings)


def test_driving_is_on_unless_it_is_switched_off_for_the_fleet_or_one_backend() -> None:
    assert Settings().driving
    assert not load(None, {"TIERGATE_DRIVING": "off"}).driving
    made = Settings.model_validate({"backends": ["http://a:1,driving=off", "http://b:1"]})
    assert [one.driving for one in made.backends] == [False, None]
