"""What replicas are told of each other, when messages get lost, come twice, or are not ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson
import pytest

from scheduling.load import LoadVector
from state.contract import Held, HeldEvent, Membership, StoreEvent
from state.redis.codec import News, Picture, StoredPart, StoredTotal, TakenPart, read_news
from state.redis.keys import Keys
from state.redis.mirror import Hearing, Mirror
from state.redis.store import RedisStore
from tests.servers import Kind

from .conftest import PATIENT, SERVERS, Asking, ServedCluster

PATIENCE_S = 20.0
CHAT = Membership("chat", 10)


def news(number: int, *parts: TakenPart, era: int = 1, sender: str = "b", gone: tuple[str, ...] = ()) -> News:
    return News(era, number, sender, parts, {}, (), (), (), (), gone)


def part(decodes: int, *, replica: str = "b", membership: Membership = CHAT) -> TakenPart:
    return TakenPart("x", replica, membership, LoadVector(decodes, 10 * decodes, 0, {"chat": decodes}, 0.5))


def picture(number: int, *parts: TakenPart, era: int = 1, membership: Membership = CHAT) -> Picture:
    total = StoredTotal(membership, LoadVector(), 0, None)
    stored = tuple(StoredPart(one, 1, 1) for one in parts)
    return Picture(era, membership.epoch, number, {"x": total}, stored, (), {"a": 0.0, "b": 0.1}, frozenset())


class TestMirror:
    def test_what_follows_is_taken_and_what_is_old_or_missed_is_not(self) -> None:
        mirror = Mirror("a", lambda: 0.0)
        mirror.adopt(picture(7))
        assert mirror.hear(news(7)) is Hearing.OLD
        assert mirror.hear(news(9)) is Hearing.MISSED
        assert mirror.hear(news(8, era=2)) is Hearing.MISSED
        assert mirror.hear(news(8)) is Hearing.NEXT
        mirror.apply(news(8, part(2)))
        assert mirror.hear(news(8)) is Hearing.OLD
        assert mirror.foreign("x").decodes == 2

    def test_only_what_changed_is_told(self) -> None:
        mirror = Mirror("a", lambda: 0.0)
        assert set(mirror.adopt(picture(1, part(2))).backends) == {"x"}
        assert not mirror.apply(news(2, part(2))).backends
        assert set(mirror.apply(news(3, part(3))).backends) == {"x"}
        assert not mirror.apply(news(4, part(9, replica="a"))).backends  # its own
        assert set(mirror.apply(news(5, part(0))).backends) == {"x"}
        assert not mirror.adopt(picture(6)).backends
        assert set(mirror.adopt(picture(6, membership=Membership(None, 11))).backends) == {"x"}

    def test_readings_age_from_when_they_were_heard(self) -> None:
        now_s = 100.0
        mirror = Mirror("a", lambda: now_s)
        mirror.adopt(picture(1, part(2)))
        now_s = 102.0
        mirror.apply(news(2, part(1, replica="c")))
        assert mirror.foreign("x").age_s == pytest.approx(2.5)
        assert mirror.foreign("x").decodes == 3

    def test_the_dead_count_on_until_they_are_gone(self) -> None:
        mirror = Mirror("a", lambda: 0.0)
        mirror.adopt(picture(1, part(2)))
        assert mirror.live == {"a", "b"}
        mirror.apply(News(1, 2, "a", (), {}, (), (), (), ("b",), ()))
        assert (mirror.live, mirror.orphans) == ({"a"}, {"b"})
        assert mirror.foreign("x").decodes == 2
        mirror.apply(news(3, part(0), sender="a", gone=("b",)))
        assert (mirror.live, mirror.orphans) == ({"a"}, set())
        assert mirror.foreign("x").idle

    def test_a_lost_membership_is_noticed_and_a_removed_backend_is_none(self) -> None:
        mirror = Mirror("a", lambda: 0.0)
        mirror.adopt(picture(1, membership=Membership("chat", 20)))
        assert mirror.ahead_of(picture(1, membership=Membership("chat", 10)))
        assert not mirror.ahead_of(picture(1, membership=Membership("chat", 20)))
        assert not mirror.ahead_of(Picture(1, 25, 2, {}, (), (), {}, frozenset()))  # removed since
        assert mirror.ahead_of(Picture(1, 15, 2, {}, (), (), {}, frozenset()))  # never heard of it


@pytest.fixture(params=list(Kind), ids=lambda kind: kind.value)
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[ServedCluster]:
    made = ServedCluster(SERVERS.url(request.param), SERVERS.fleet(), PATIENT)
    yield made
    await made.close()


async def told(
    store: RedisStore, cause: Callable[[], Awaitable[object]], holds: Callable[[StoreEvent | HeldEvent], bool]
) -> None:
    """Wait for an event."""
    events = store.watch()
    await cause()
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            if holds(event):
                return


@pytest.mark.parametrize("payload", [b"not ours", b"{}", b'{"era": 1, "n": 1, "from": "z", "parts": [[1]]}'])
async def test_a_message_that_is_not_ours_harms_nobody(
    fleet: ServedCluster, asking: Asking, payload: bytes
) -> None:
    one, two = await fleet.replica("a"), await fleet.replica("b")
    epoch = (await one.add_backend("x", "chat")).epoch
    await fleet.connection().run("PUBLISH", Keys.of(fleet.fleet).channel, payload)
    await told(
        two,
        lambda: one.reserve("1", [asking("x", epoch)]),
        lambda event: isinstance(event, StoreEvent) and event.load.foreign.decodes == 1,
    )


async def test_what_was_lost_with_messages_is_read_anew(fleet: ServedCluster, asking: Asking) -> None:
    """A replica does not hear of a reservation and a held request; the next message shows that it missed some."""
    one, two = await fleet.replica("a"), await fleet.replica("b")
    epoch = (await one.add_backend("x", "chat")).epoch
    await one.add_backend("y", "chat")
    hear, deaf = two.hear, True
    two.hear = lambda payload: True if deaf else hear(payload)  # type: ignore[method-assign]  # lost on the way
    await one.reserve("1", [asking("x", epoch)])
    await one.publish((), (Held("m", "chat", 0.5, 1, 900),))
    await one.announce(["x"])
    await asyncio.sleep(0.1)
    assert two._mirror.foreign("x").idle
    deaf = False
    seen: set[str] = set()

    def both(event: StoreEvent | HeldEvent) -> bool:
        if isinstance(event, HeldEvent) and event.held:
            seen.add("held")
        if isinstance(event, StoreEvent) and event.load.foreign.decodes == 1:
            seen.add(event.backend)
        return seen == {"held", "x"}

    await told(two, lambda: one.add_backend("z", None), both)


def test_news_of_a_later_minor_form_are_read() -> None:
    """Fields that this version does not know are passed over."""
    payload = {"era": 5, "n": 6, "from": "b", "members": [["x", 9, False]], "parts": {}, "later": [1]}
    read = read_news(orjson.dumps(payload))
    assert (read.era, read.number, read.sender, read.parts) == (5, 6, "b", ())
    assert read.members == {"x": Membership(None, 9)}
