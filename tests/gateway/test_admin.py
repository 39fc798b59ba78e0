"""The operators' side: health, metrics, tiers, state, decisions, keys, reload."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import ValidationError

from gateway.config import BackendSettings, Settings, TierSettings
from tests.gateway.rig import MODEL, client, engine, gateway, settings_for, settled, until

_TOKEN = {"authorization": "Bearer secret"}
_NO_TEXT = {"authorization": "Bearer \udcff"}  # sent as the byte 0xff


async def test_health_metrics_and_state_after_traffic() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        await ask.read_chat()
        await ask.read_chat("cut")
        await settled(made)
        async with ask.session.get(f"{ask.base}/healthz") as answer:
            assert answer.status == 200
        async with ask.session.get(f"{ask.base}/readyz") as answer:
            assert await answer.json() == {"status": "ok", "backends_up": 1, "backends": 1, "store": "shared"}
        async with ask.session.get(f"{ask.base}/metrics") as answer:
            text = await answer.text()
        assert 'tiergate_requests_ended_total{end="finished"} 1.0' in text
        assert 'tiergate_requests_ended_total{end="failed"} 1.0' in text
        assert 'tiergate_tier_attained_total{tier="chat"} 1.0' in text
        assert 'tiergate_backend_decodes{backend="e0",tier="chat"} 0.0' in text
        async with ask.session.get(f"{ask.base}/admin/v1/state", headers=_TOKEN) as answer:
            state = await answer.json()
        assert state["requests"]["conserved"] is True
        assert state["requests"]["finished"] == 1
        [backend] = state["backends"]
        assert (backend["name"], backend["tier"], backend["running"]) == ("e0", "chat", 0)
        [chat] = [tier for tier in state["tiers"] if tier["name"] == "chat"]
        assert (chat["offered"], chat["attained"]) == (2, 1)


async def test_the_admin_api_is_closed_without_its_token() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, _NO_TEXT):
            async with ask.session.get(f"{ask.base}/admin/v1/state", headers=headers) as answer:
                assert answer.status == 401
                assert answer.content_type == "application/problem+json"


async def test_without_a_configured_token_the_admin_api_stays_closed() -> None:
    async with (
        engine() as one,
        gateway(settings_for(one, admin_token=None)) as made,
        client(made) as ask,
        ask.session.get(f"{ask.base}/admin/v1/state", headers=_TOKEN) as answer,
    ):
        assert answer.status == 403


async def test_tiers_are_read_and_replaced() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        url = f"{ask.base}/admin/v1/tiers"
        async with ask.session.get(url, headers=_TOKEN) as answer:
            before, etag = await answer.json(), answer.headers["etag"]
        assert [tier["name"] for tier in before["tiers"]] == ["fast", "chat", "summary", "batch"]
        new = {"tiers": [{"name": "only", "tpot_ms": 80, "ttft_ms": 3000}], "default_tier": "only"}
        async with ask.session.put(url, json=new, headers=_TOKEN | {"if-match": '"old"'}) as answer:
            assert answer.status == 412
        wrongs: list[object] = [
            {"tiers": []},
            {"tiers": [{"name": "a", "tpot": 1}]},
            {"tiers": new["tiers"]},
            {},
            [],
        ]
        for wrong in wrongs:
            async with ask.session.put(url, json=wrong, headers=_TOKEN) as answer:
                assert answer.status in {400, 422}, wrong
        async with ask.session.put(url, json=new, headers=_TOKEN | {"if-match": etag}) as answer:
            assert answer.status == 200
            assert answer.headers["etag"] != etag
        async with ask.chat() as answer:
            assert answer.headers["x-tiergate-tier"] == "only"
        async with ask.chat(headers={"x-slo-tier": "chat"}) as answer:
            assert answer.status == 400


async def test_a_decision_can_be_asked_for() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat(headers={"x-request-id": "abc"}) as answer:
            await answer.read()
        await settled(made)
        async with ask.session.get(f"{ask.base}/admin/v1/decisions/abc", headers=_TOKEN) as answer:
            decision = await answer.json()
        assert decision["backend"] == "e0"
        assert decision["candidates"][0]["verdict"] == "feasible"
        async with ask.session.get(f"{ask.base}/admin/v1/decisions/nobody", headers=_TOKEN) as answer:
            assert answer.status == 404


async def test_keys_let_in_and_are_not_passed_on() -> None:
    keys = [{"key": "k1", "tenant": "t1", "tier": "summary"}]
    async with engine() as one, gateway(settings_for(one, keys=keys)) as made, client(made) as ask:
        assert (await ask.read_chat())[0] == 401
        assert (await ask.read_chat(headers={"authorization": "Bearer k2"}))[0] == 401
        assert (await ask.read_chat(headers=_NO_TEXT))[0] == 401
        async with ask.session.get(f"{ask.base}/v1/models") as answer:
            assert answer.status == 401
        for headers in ({"authorization": "Bearer k1"}, {"x-api-key": "k1"}):
            async with ask.chat(headers=headers) as answer:
                assert answer.status == 200
                assert answer.headers["x-tiergate-tier"] == "summary"
            sent = {name.lower() for name in one.headers[-1]}
            assert not sent & {"authorization", "x-api-key"}


async def test_a_key_may_be_configured_by_its_digest() -> None:
    digest = hashlib.sha256(b"k1").hexdigest()
    keys = [{"sha256": digest, "tenant": "t1", "tier": "summary"}]
    async with engine() as one, gateway(settings_for(one, keys=keys)) as made, client(made) as ask:
        assert (await ask.read_chat(headers={"authorization": f"Bearer {digest}"}))[0] == 401
        async with ask.chat(headers={"authorization": "Bearer k1"}) as answer:
            assert answer.status == 200
            assert answer.headers["x-tiergate-tier"] == "summary"


@pytest.mark.parametrize("key", [{}, {"key": "k", "sha256": "0" * 64}, {"sha256": "k1"}])
def test_a_key_has_one_form(key: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="sha256"):
        Settings.model_validate({"keys": [{"tenant": "t", **key}]})


async def test_errors_speak_the_clients_dialect() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.session.post(f"{ask.base}/v1/messages", json={"model": MODEL}) as answer:
            body = await answer.json()
            assert (answer.status, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
        async with ask.session.get(f"{ask.base}/v1/chat/completions") as answer:
            assert answer.status == 405
        async with ask.session.get(f"{ask.base}/nothing") as answer:
            assert answer.status == 404
            assert (await answer.json())["error"]["code"] == "unknown_path"
        assert answer.headers["x-request-id"]


async def test_reloading_changes_tiers_and_backends_and_cuts_no_stream() -> None:
    async with engine() as one, engine() as two, gateway(settings_for(one)) as made, client(made) as ask:
        async with ask.chat("first_then_wait") as stream:
            old = made.live.now.settings
            backend = BackendSettings(url=two.url, name="new", profile=old.backends[0].profile)
            tiers = (TierSettings(name="only", tpot_ms=80, ttft_ms=3000),)
            await made.reload(
                old.model_copy(update={"backends": (backend,), "tiers": tiers, "default_tier": "only"})
            )
            await until(lambda: made.fleet.up == 1)
            async with ask.chat() as answer:
                assert answer.headers["x-tiergate-backend"] == "new"
                assert answer.headers["x-tiergate-tier"] == "only"
            one.release.set()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")
        await settled(made)
        await until(lambda: not one.server.connections)
        assert made.view.conserved()
