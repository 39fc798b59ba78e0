"""One policy for all replicas: who is adopted, who is refused, and what outlives a store that forgets."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import replace

import pytest

from gateway.app import Gateway
from gateway.config import ConfigError, KeySettings, Settings, TierSettings, key_digest
from gateway.policy import SCHEMA, FleetPolicy, PolicyRefused, policy_of, read_body, to_body, with_policy
from gateway.shared import PolicyConflict, PolicySource, begin
from state.contract import StoreUnavailable
from state.documents import (
    Contribution,
    Document,
    Draft,
    MemoryDocuments,
    MemoryDocumentState,
    Stale,
)
from tests.gateway.policies import Replica, file_of, only_tier, replica
from tests.gateway.rig import client, engine, gateway, settings_for, until

_TOKEN = {"authorization": "Bearer secret"}
_TIERS = (TierSettings(name="only", ttft_ms=3000, tpot_ms=80),)
_ONLY = {"tiers": [{"name": "only", "ttft_ms": 3000, "tpot_ms": 80}], "default_tier": "only"}


class Unsteady:
    """A store that can be made not to answer, to lose answers, and to forget. Wraps a real one."""

    def __init__(self, state: MemoryDocumentState) -> None:
        self._state = state
        self._inner = MemoryDocuments(state)
        self.down = False
        self.lose_answers = 0

    def _ask(self) -> None:
        if self.down:
            raise StoreUnavailable("down, by the test")

    def forget(self) -> None:
        """Emptied and back: watchers are told that something may have happened."""
        self._state.current = None
        self._state.past.clear()
        for watching in self._state._watching:
            watching.notice()

    async def read(self) -> Document | None:
        self._ask()
        return await self._inner.read()

    async def put(self, draft: Draft, expected: int) -> Document | Stale:
        self._ask()
        answer = await self._inner.put(draft, expected)
        if self.lose_answers:
            self.lose_answers -= 1
            raise StoreUnavailable("the answer was lost, by the test")
        return answer

    async def put_back(self, document: Document) -> Document:
        self._ask()
        return await self._inner.put_back(document)

    async def history(self) -> tuple[Document, ...]:
        self._ask()
        return await self._inner.history()

    def watch(self) -> AsyncGenerator[Document | None, None]:
        return self._inner.watch()

    async def contribute(self, source: str, body: str) -> None:
        self._ask()
        await self._inner.contribute(source, body)

    async def contributions(self) -> Mapping[str, Contribution]:
        self._ask()
        return await self._inner.contributions()

    async def run(self) -> None:
        await self._inner.run()

    async def close(self) -> None:
        await self._inner.close()


# --- the document ----------------------------------------------------------------------------------------------


def test_the_document_holds_no_client_key_and_says_all_else() -> None:
    settings = file_of(
        backends=[{"url": "http://a:1", "name": "a", "api_key": "to-the-engine", "limits": {"kv_tokens": 5}}],
        keys=[{"key": "sk-client", "tenant": "t", "tier": "chat"}],
        policy={"name": "random", "options": {"scan_held": 3, "refuses": False, "cooldown_s": 0.5}},
    )
    policy = policy_of(settings)
    body = to_body(policy)
    assert "sk-client" not in body
    assert "to-the-engine" in body
    again = read_body(Document(1, 0.0, Draft("c", SCHEMA, body, "a", "r")))
    assert again == policy
    assert to_body(again) == body
    [key] = again.keys
    assert key.sha256 == key_digest("sk-client")
    # Another replica's own settings stay its own.
    mine = with_policy(file_of(port=1234), again)
    assert (mine.port, mine.backends, mine.policy) == (1234, settings.backends, settings.policy)


@pytest.mark.parametrize(
    ("schema", "change", "message"),
    [
        (SCHEMA + 1, {}, "upgrade this replica"),
        (SCHEMA, {"stages": []}, "stages: Extra inputs are not permitted"),
        (SCHEMA, {"tiers": [{"name": "a", "jitter_ms": 1}]}, "jitter_ms"),
        (SCHEMA, {"backends": [{"url": "http://a:1", "engine": "next"}]}, "engine"),
        (SCHEMA, {"default_tier": "none"}, "none"),
        (SCHEMA, {"tiers": "secret-value"}, "tiers"),
    ],
)
def test_a_document_that_is_not_understood_is_refused(
    schema: int, change: dict[str, object], message: str
) -> None:
    fields = json.loads(to_body(policy_of(file_of()))) | change
    document = Document(2, 0.0, Draft("c", schema, json.dumps(fields), "a", "r"))
    with pytest.raises(PolicyRefused, match=message) as refused:
        with_policy(file_of(), read_body(document))
    assert "secret-value" not in str(refused.value)


# --- replicas --------------------------------------------------------------------------------------------------


async def test_the_first_file_seeds_and_a_later_replica_adopts() -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)) as one:
        assert one.version == 1
        other_file = file_of(backends=["http://b:1"], port=99)
        async with replica(MemoryDocuments(state), other_file) as two:
            assert two.version == 1
            assert two.shared.policy == one.shared.policy
        forced = PolicySource(MemoryDocuments(state), adopt_file=True)
        async with replica(forced.documents, other_file, forced) as three:
            assert three.version == 2
            await until(lambda: one.version == 2)
        assert [backend.url for backend in one.shared.policy.backends] == ["http://b:1"]
        assert one.applied[-1].port == 8080
        async with replica(forced.documents, other_file, forced) as four:
            assert four.version == 2  # it says the same


async def test_a_file_without_backends_takes_the_stores_and_seeds_nothing() -> None:
    state = MemoryDocumentState()
    none = file_of(backends=[])
    for adopt_file in (False, True):
        begun = await begin(none, PolicySource(MemoryDocuments(state), adopt_file=adopt_file))
        assert begun.document is None
        assert await MemoryDocuments(state).read() is None
    async with replica(MemoryDocuments(state)) as one:
        begun = await begin(none, PolicySource(MemoryDocuments(state)))
        assert begun.document is not None
        assert begun.settings.backends == one.shared.policy.backends != ()


async def test_a_file_that_changed_is_not_taken_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)):
        caplog.clear()
        async with replica(MemoryDocuments(state), file_of(default_tier="batch")):
            [line] = [record.getMessage() for record in caplog.records]
            assert "default_tier" in line
            assert "--adopt-file" in line


async def test_a_change_here_is_in_force_there_and_a_race_has_one_winner() -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)) as one, replica(MemoryDocuments(state)) as two:
        await one.shared.change(only_tier, "test")
        assert one.tiers == ["only"]
        await until(lambda: two.tiers == ["only"])
        assert (one.version, two.version) == (2, 2)

        async def race(who: Replica, name: str) -> str:
            was = who.tiers

            def edit(now: FleetPolicy) -> FleetPolicy:
                if [tier.name for tier in now.tiers] != was:
                    raise PolicyConflict("the tiers were changed")
                return now.model_copy(update={"tiers": (TierSettings(name=name),), "default_tier": name})

            try:
                await who.shared.change(edit, name)
            except PolicyConflict:
                return "conflict"
            return name

        told = await asyncio.gather(race(one, "x"), race(two, "y"))
        [winner] = [name for name in told if name != "conflict"]
        await until(lambda: one.tiers == two.tiers == [winner])


async def test_changes_that_do_not_touch_each_other_are_both_made() -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)) as one, replica(MemoryDocuments(state)) as two:
        keys = (KeySettings(sha256="0" * 64, tenant="t"),)
        await asyncio.gather(
            one.shared.change(only_tier, "tiers"),
            two.shared.change(lambda now: now.model_copy(update={"keys": keys}), "keys"),
        )
        await until(lambda: one.version == two.version == 3)
        assert one.shared.policy == two.shared.policy
        assert (one.tiers, one.shared.policy.keys) == (["only"], keys)


async def test_the_same_change_on_all_replicas_is_one_version() -> None:
    """A file that was rolled out, and a signal to everybody."""
    state = MemoryDocumentState()
    file = file_of(default_tier="batch")
    async with (
        replica(MemoryDocuments(state)) as one,
        replica(MemoryDocuments(state)) as two,
        replica(MemoryDocuments(state)) as three,
    ):
        await asyncio.gather(*(who.shared.reload(file) for who in (one, two, three)))
        await until(lambda: one.version == two.version == three.version)
        assert one.version == 2


async def test_an_earlier_version_can_be_had_again() -> None:
    async with replica(MemoryDocuments()) as one:
        was = one.shared.policy
        await one.shared.change(only_tier, "test")
        again = await one.shared.restore(1)
        assert (again.version, one.shared.policy) == (3, was)
        with pytest.raises(LookupError):
            await one.shared.restore(7)


async def test_a_policy_that_cannot_be_used_changes_nothing() -> None:
    def check(settings: Settings) -> None:
        if settings.policy.name != "polyserve":
            raise ConfigError("policy.name: unknown")

    documents = MemoryDocuments()
    async with replica(documents, source=PolicySource(documents, check)) as one:
        for update in ({"default_tier": "nobody"}, {"policy": {"name": "next"}}):
            with pytest.raises(ConfigError):
                await one.shared.change(
                    lambda now, update=update: FleetPolicy.model_validate(  # type: ignore[misc]
                        json.loads(to_body(now)) | update
                    ),
                    "test",
                )
        assert (one.version, one.applied) == (1, [])
        assert len(await documents.history()) == 1


async def test_a_newer_document_is_refused_and_what_is_in_force_stays() -> None:
    state = MemoryDocumentState()
    foreign = MemoryDocuments(state)
    async with replica(MemoryDocuments(state)) as one:
        was = one.shared.policy
        newer = Draft("newer", SCHEMA + 1, '{"stages": []}', "b", "an upgrade")
        assert isinstance(await foreign.put(newer, 1), Document)
        await until(lambda: one.numbers.policy_refused_version == 2)
        assert (one.version, one.shared.policy, one.numbers.policies_refused) == (1, was, 1)
        with pytest.raises(PolicyConflict, match="cannot be read here"):
            await one.shared.change(only_tier, "test")
        assert one.numbers.policies_refused == 1  # met again, told once
        # One that starts now serves by its file.
        async with replica(MemoryDocuments(state), file_of(default_tier="batch")) as two:
            assert (two.version, two.numbers.policy_refused_version) == (0, 2)
            assert two.shared.policy.default_tier == "batch"
        # And it was not put back over the newer one.
        assert [found.version for found in await foreign.history()] == [2, 1]
        good = replace(newer, change_id="good", schema=SCHEMA, body=to_body(only_tier(was)))
        assert isinstance(await foreign.put(good, 2), Document)
        await until(lambda: one.version == 3)
        assert (one.tiers, one.numbers.policy_refused_version) == (["only"], 0)


async def test_a_store_that_forgot_gets_back_what_is_in_force() -> None:
    state = MemoryDocumentState()
    unsteady = Unsteady(state)
    async with replica(unsteady) as one:
        await one.shared.change(only_tier, "test")
        assert one.version == 2
        unsteady.forget()
        # A replica that comes now may be the first to find nothing, and seeds its file. The higher version stands.
        async with replica(MemoryDocuments(state), file_of(default_tier="batch")) as two:
            await until(lambda: two.version == one.version == 2)
            assert two.shared.policy == one.shared.policy
            assert two.tiers == ["only"]
        found = await unsteady.read()
        assert found == one.shared.document


async def test_an_older_version_is_never_put_back() -> None:
    state = MemoryDocumentState()
    unsteady, steady = Unsteady(state), MemoryDocuments(state)
    async with replica(unsteady) as behind, replica(steady) as ahead:
        unsteady.down = True
        await behind.shared._lock.acquire()  # it hears of nothing from here on
        await ahead.shared.change(only_tier, "test")
        state.current = None
        unsteady.down = False
        behind.shared._lock.release()
        unsteady.forget()
        await until(lambda: behind.version == ahead.version == 2)
        assert behind.tiers == ahead.tiers == ["only"]


async def test_without_a_store_the_file_is_served_and_the_policy_is_found_later() -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)) as one:
        await one.shared.change(only_tier, "test")
    unsteady = Unsteady(state)
    unsteady.down = True
    async with replica(unsteady) as two:
        assert (two.version, two.tiers[0]) == (0, "fast")
        with pytest.raises(StoreUnavailable):
            await two.shared.change(only_tier, "test")
        unsteady.down = False
        for watching in state._watching:
            watching.notice()
        await until(lambda: two.version == 2)
        assert two.tiers == ["only"]


async def test_a_lost_answer_makes_one_version() -> None:
    unsteady = Unsteady(MemoryDocumentState())
    async with replica(unsteady) as one:
        unsteady.lose_answers = 2
        document = await one.shared.change(only_tier, "test")
        assert document.version == one.version == 2
        assert len(await unsteady.history()) == 2


async def test_reading_the_file_again_puts_it_in_the_store() -> None:
    state = MemoryDocumentState()
    async with replica(MemoryDocuments(state)) as one, replica(MemoryDocuments(state)) as two:
        file = file_of(default_tier="batch", admin_token="t2")
        await one.shared.reload(file)
        await until(lambda: two.version == 2)
        assert two.shared.policy.default_tier == "batch"
        assert two.applied[-1].admin_token is None  # each replica's own
        token = one.applied[-1].admin_token
        assert token is not None
        assert token.get_secret_value() == "t2"
        await two.shared.reload(file)  # the same file, sent to everybody
        assert two.version == 2
        two_token = two.applied[-1].admin_token
        assert two_token is not None


# --- gateways --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _two(first: Settings, second: Settings) -> AsyncIterator[tuple[Gateway, Gateway]]:
    state = MemoryDocumentState()
    sources = [PolicySource(MemoryDocuments(state), replica=name) for name in ("one", "two")]
    async with gateway(first, policy=sources[0]) as one, gateway(second, policy=sources[1]) as two:
        yield one, two


async def test_tiers_put_on_one_gateway_hold_on_the_other_and_no_stream_is_cut() -> None:
    async with engine() as one:
        settings = settings_for(one)
        async with (
            _two(settings, settings) as (first, second),
            client(first) as ask,
            client(second) as ask2,
            ask2.chat("first_then_wait") as stream,
        ):
            url = f"{ask.base}/admin/v1/tiers"
            async with ask.session.put(url, json=_ONLY, headers=_TOKEN) as answer:
                assert answer.status == 200
                etag = answer.headers["etag"]
            await until(lambda: second.live.now.version == 2)
            async with ask2.session.get(f"{ask2.base}/admin/v1/tiers", headers=_TOKEN) as answer:
                assert answer.headers["etag"] == etag
            async with ask2.chat() as answer:
                assert answer.headers["x-tiergate-tier"] == "only"
            one.release.set()
            assert (await stream.read()).endswith(b"data: [DONE]\n\n")


async def test_racing_puts_on_two_gateways_have_one_winner() -> None:
    async with engine() as one:
        settings = settings_for(one)
        async with _two(settings, settings) as (first, second), client(first) as ask, client(second) as ask2:

            async def put(base: str, name: str, etag: str) -> int:
                body = {"tiers": [{"name": name}], "default_tier": name}
                headers = _TOKEN | {"if-match": etag}
                async with ask.session.put(f"{base}/admin/v1/tiers", json=body, headers=headers) as answer:
                    return answer.status

            for turn in range(4):
                async with ask.session.get(f"{ask.base}/admin/v1/tiers", headers=_TOKEN) as answer:
                    etag = answer.headers["etag"]
                told = await asyncio.gather(put(ask.base, f"a{turn}", etag), put(ask2.base, f"b{turn}", etag))
                assert sorted(told) == [200, 412]
                await until(lambda: first.live.now.version == second.live.now.version)
                assert first.live.now.settings.tiers == second.live.now.settings.tiers


class Overtaken(MemoryDocuments):
    """Somebody else always changes the tiers just before."""

    def __init__(self, state: MemoryDocumentState) -> None:
        super().__init__(state)
        self.others = 0

    async def put(self, draft: Draft, expected: int) -> Document | Stale:
        if expected:
            self.others += 1
            policy = only_tier(read_body(Document(1, 0.0, draft)))
            tier = policy.tiers[0].model_copy(update={"ttft_ms": 1000.0 + self.others})
            body = to_body(policy.model_copy(update={"tiers": (tier,)}))
            await super().put(replace(draft, change_id=f"other-{self.others}", body=body), expected)
        return await super().put(draft, expected)


@pytest.mark.parametrize(("conditional", "status"), [(False, 409), (True, 412)])
async def test_a_put_that_somebody_overtook_is_a_conflict(conditional: bool, status: int) -> None:
    source = PolicySource(Overtaken(MemoryDocumentState()))
    async with engine() as one, gateway(settings_for(one), policy=source) as made, client(made) as ask:
        url = f"{ask.base}/admin/v1/tiers"
        async with ask.session.get(url, headers=_TOKEN) as answer:
            etag = answer.headers["etag"]
        headers = _TOKEN | ({"if-match": etag} if conditional else {})
        async with ask.session.put(url, json=_ONLY, headers=headers) as answer:
            assert answer.status == status
            assert "changed" in (await answer.json())["detail"]
        assert made.live.now.settings.tiers[0].ttft_ms == 1001.0  # the other's are in force


async def test_backends_and_keys_of_one_gateways_file_come_to_the_other() -> None:
    async with engine() as one, engine() as two:
        settings = settings_for(one)
        async with _two(settings, settings) as (first, second), client(second) as ask:
            assert (await ask.read_chat())[0] == 200
            changed = settings_for(one, two, keys=[{"key": "k1", "tenant": "t1"}])
            await first.reload(changed)
            await until(lambda: second.fleet.up == 2)
            assert (await ask.read_chat())[0] == 401
            assert (await ask.read_chat(headers={"authorization": "Bearer k1"}))[0] == 200
            async with ask.session.get(f"{ask.base}/metrics") as answer:
                assert "tiergate_policy_version 2.0" in await answer.text()
