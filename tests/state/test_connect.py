"""Connections to real servers: plain, with rights, over TLS and sockets, through Sentinels, in a Cluster.

Failovers are slow, so each kind of group runs on one kind of server here and on the other in
`test_redis_deployments.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from state.redis import messages
from state.redis.address import Address, Deployment, parse_url
from state.redis.connect import ERRORS, Connection, ConnectOptions, Message, Subscription, connect
from state.redis.rights import SENTINEL_RULE, acl_rule
from tests.server_groups import DataCluster, Watched
from tests.servers import DataServer, Kind, Options, make_certificates

BOTH = pytest.mark.parametrize("kind", list(Kind))
QUICK = ConnectOptions(timeout_s=0.2, connect_timeout_s=0.2)
AGAIN_S = 0.05
PATIENCE_S = 30.0  # how long a test waits for what must come; far below the tests' own limit


@pytest.fixture(params=list(Kind))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[DataServer]:
    """A server of the test's own, to be killed and paused."""
    async with DataServer(request.param, tmp_path) as started:
        yield started


async def _works_again(connection: Connection, *words: str | int) -> object:
    """What the command answers, as soon as it does."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await connection.run(*words)
            except ERRORS:
                await asyncio.sleep(AGAIN_S)


async def _next(subscription: Subscription) -> Message:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await subscription.next(1.0)
            if message is not None:
                return message


async def _until_broken(subscription: Subscription) -> None:
    """Ends when the subscription says that messages were lost."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while True:
                await subscription.next(0.05)
        except ERRORS:
            await subscription.close()


async def test_scripts_and_names(server: DataServer) -> None:
    async with connect(parse_url(server.url), ConnectOptions(client_name="gateway one\n")) as connection:
        assert await connection.run("EVAL", "return {1, 'x', {2}, false}", 0) == [1, b"x", [2], None]
        with pytest.raises(ResponseError, match="broken"):
            await connection.run("EVAL", "return redis.error_reply('broken')", 0)
        assert "name=gateway_one_" in str(server.ask("CLIENT", "LIST", "TYPE", "normal"))


async def test_messages_come_in_order_and_none_after_the_subscription_is_missed(server: DataServer) -> None:
    async with connect(parse_url(server.url)) as connection:
        subscription = await connection.subscribe("one", "two")
        wanted = [Message(channel, b"%d" % number) for number in range(20) for channel in ("one", "two")]
        for message in wanted:
            assert await connection.run("PUBLISH", message.channel, message.payload) == 1
        assert [await _next(subscription) for _ in wanted] == wanted
        assert await subscription.next(0.01) is None
        await subscription.close()
        assert await connection.run("PUBLISH", "one", b"x") == 0


async def test_connections_are_bounded_and_who_finds_none_waits(server: DataServer) -> None:
    async with connect(parse_url(server.url), ConnectOptions(max_connections=2, timeout_s=10.0)) as connection:
        answers = await asyncio.gather(*(connection.run("EVAL", f"return {n}", 0) for n in range(100)))
        assert answers == list(range(100))
        clients = str(server.ask("CLIENT", "LIST", "TYPE", "normal"))
        assert clients.count("name=tiergate") == 2


async def test_a_late_answer_is_never_taken_for_another(server: DataServer) -> None:
    """Whoever gives up, by the connection's own time or by being cancelled, leaves nothing for the next."""
    async with connect(parse_url(server.url), ConnectOptions(timeout_s=0.2, max_connections=1)) as connection:
        await connection.run("EVAL", "return 0", 0)
        server.pause()
        with pytest.raises(ERRORS):
            await connection.run("EVAL", "return 1", 0)
        server.resume()
        assert await _works_again(connection, "EVAL", "return 2", 0) == 2
        server.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.run("EVAL", "return 3", 0)
        server.resume()
        assert await _works_again(connection, "EVAL", "return 4", 0) == 4


async def test_a_killed_server_is_found_again(server: DataServer) -> None:
    async with connect(parse_url(server.url), QUICK) as connection:
        subscription = await connection.subscribe("news")
        server.kill()
        await _until_broken(subscription)
        with pytest.raises(ERRORS):
            await connection.run("EVAL", "return 1", 0)
        with pytest.raises(ERRORS):
            await connection.subscribe("news")
        await server.start()
        assert await connection.run("EVAL", "return 1", 0) == 1
        subscription = await connection.subscribe("news")
        await connection.run("PUBLISH", "news", "x")
        assert await _next(subscription) == Message("news", b"x")
        await subscription.close()


async def test_a_silent_peer_ends_a_subscription_and_a_quiet_one_does_not(
    server: DataServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "SILENCE_S", 0.2)
    async with connect(parse_url(server.url), QUICK) as connection:
        subscription = await connection.subscribe("news")
        for _ in range(20):
            assert await subscription.next(0.05) is None
        server.pause()
        await _until_broken(subscription)
        server.resume()


async def test_a_wrong_password_is_an_error_that_does_not_show_it(tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path, Options(password="right")) as server:
        for user in ("", "hush"):
            async with connect(parse_url(server.url_as(user, "hush"))) as connection:
                with pytest.raises(AuthenticationError) as caught:
                    await connection.run("EVAL", "return 1", 0)
                assert "hush" not in str(caught.value) + repr(connection)


@BOTH
async def test_the_documented_rights_are_enough_and_no_more(kind: Kind, tmp_path: Path) -> None:
    users = [f"tiergate on >secret {acl_rule('eu')}"]
    async with DataServer(kind, tmp_path, Options(password="admin", users=users)) as server:
        connection = connect(parse_url(server.url_as("tiergate", "secret")))
        script = (
            "redis.call('HSET', KEYS[1], 'a', 1) redis.call('PUBLISH', KEYS[1], 'x') return redis.call('TIME')"
        )
        async with connection:
            subscription = await connection.subscribe("{tg1:eu}:news")
            await connection.run("EVAL", script, 1, "{tg1:eu}:news")
            assert await _next(subscription) == Message("{tg1:eu}:news", b"x")
            await subscription.close()
            for refused in (
                ("EVAL", script, 1, "{tg1:us}:load"),
                ("PUBLISH", "{tg1:us}:news", "x"),
                ("SUBSCRIBE", "{tg1:us}:news"),
                ("FLUSHALL",),
                ("CONFIG", "GET", "*"),
                ("KEYS", "*"),
                ("SCRIPT", "FLUSH"),
                ("ACL", "LIST"),
            ):
                with pytest.raises(NoPermissionError):
                    await connection.run(*refused)


async def test_a_password_file_is_read_anew_at_every_login(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("one\n")
    async with DataServer(Kind.REDIS, tmp_path / "server", Options(password="one")) as server:
        url = f"redis://127.0.0.1:{server.port}?password_file={file}"
        async with connect(parse_url(url)) as connection:
            assert await connection.run("EVAL", "return 1", 0) == 1
            server.ask("CONFIG", "SET", "requirepass", "two")
            server.options = Options(password="two")
            server.ask("CLIENT", "KILL", "TYPE", "normal")
            file.write_text("two\n")
            assert await _works_again(connection, "EVAL", "return 2", 0) == 2
            server.ask("CLIENT", "KILL", "TYPE", "normal")
            file.unlink()
            told = ""
            while "password file cannot be read" not in told:  # the first may find its connection closed instead
                with pytest.raises(ERRORS) as lost:
                    await connection.run("EVAL", "return 3", 0)
                told = str(lost.value)


async def test_tls_with_our_authority_and_a_clients_certificate(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    strangers = make_certificates(tmp_path / "strangers")
    ours = f"tls_certificate={certificates.client_certificate}&tls_key={certificates.client_key}"
    options = Options(password="secret", tls=certificates, client_certificates=True)
    async with DataServer(Kind.REDIS, tmp_path / "server", options) as server:
        for query in (f"tls_ca={certificates.authority}&{ours}", f"tls_insecure=yes&{ours}"):
            async with connect(parse_url(f"{server.url}?{query}")) as connection:
                assert await connection.run("EVAL", "return 1", 0) == 1
                await (await connection.subscribe("news")).close()
        for query in (ours, f"tls_ca={strangers.authority}&{ours}", f"tls_ca={certificates.authority}"):
            async with connect(parse_url(f"{server.url}?{query}")) as connection:
                with pytest.raises(ERRORS):
                    await connection.run("EVAL", "return 1", 0)


async def test_tls_to_sentinels_primaries_and_a_clusters_nodes(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    groups = (
        Watched(Kind.REDIS, tmp_path / "watched", sentinels=1, tls=certificates),
        DataCluster(Kind.REDIS, tmp_path / "cluster", size=1, tls=certificates),
    )
    for group in groups:
        trusting = connect(parse_url(f"{group.url}?tls_ca={certificates.authority}"))
        careful = connect(parse_url(group.url))  # with the system's authorities
        async with group, trusting, careful:
            assert await trusting.run("EVAL", "return 1", 1, "key") == 1
            await (await trusting.subscribe("news")).close()
            assert (await trusting.open_socket("key")).is_connected
            with pytest.raises(ERRORS):
                await careful.run("EVAL", "return 1", 1, "key")


@BOTH
async def test_a_socket_with_a_database_of_its_own(kind: Kind, tmp_path: Path) -> None:
    async with DataServer(kind, tmp_path, Options(unix_socket=True, password="secret")) as server:
        async with connect(parse_url(server.unix_url.replace("db=0", "db=3"))) as connection:
            await connection.run("EVAL", "return redis.call('SET', KEYS[1], 'x')", 1, "key")
            await (await connection.subscribe("news")).close()
        assert (server.ask("DBSIZE"), "db3" in str(server.ask("INFO", "keyspace"))) == (0, True)


async def test_sentinels_lead_to_the_replica_that_took_over(tmp_path: Path) -> None:
    """One Sentinel hangs from the start, and the replica that takes over lost the last write."""
    async with Watched(Kind.REDIS, tmp_path, password="secret") as watched:
        watched.sentinels[0].pause()
        async with connect(parse_url(watched.url), QUICK) as connection:
            await connection.run("EVAL", "return redis.call('SET', KEYS[1], 'first')", 1, "key")
            subscription = await connection.subscribe("news")
            await watched.cut_replication()
            await connection.run("EVAL", "return redis.call('SET', KEYS[1], 'lost')", 1, "key")
            watched.primary.kill()
            with pytest.raises(ERRORS):
                await connection.run("EVAL", "return 1", 0)
            await _until_broken(subscription)
            await watched.promoted()
            set_it = "local was = redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], 'now') return was"
            assert await _works_again(connection, "EVAL", set_it, 1, "key") == b"first"
            subscription = await connection.subscribe("news")
            await connection.run("PUBLISH", "news", "x")
            assert await _next(subscription) == Message("news", b"x")
            await subscription.close()


async def test_sentinels_with_users_of_their_own(tmp_path: Path) -> None:
    async with Watched(Kind.REDIS, tmp_path, sentinels=1) as watched:
        sentinel = watched.sentinels[0]
        sentinel.ask("ACL", "SETUSER", "asker", "on", ">secret", *SENTINEL_RULE.split())
        sentinel.ask("ACL", "SETUSER", "default", "off")
        sentinels = "sentinel_username=asker&sentinel_password="
        async with connect(parse_url(f"{watched.url}?{sentinels}secret")) as connection:
            assert await connection.run("EVAL", "return 1", 0) == 1
        async with connect(parse_url(f"{watched.url}?{sentinels}hush")) as connection:
            with pytest.raises(ERRORS, match="no Sentinel knows") as caught:
                await connection.run("EVAL", "return 1", 0)
            assert "hush" not in str(caught.value)


async def test_a_cluster_routes_by_the_hash_tag_and_follows_a_failover(tmp_path: Path) -> None:
    async with DataCluster(Kind.VALKEY, tmp_path, copies=1) as cluster:
        connection = connect(parse_url(cluster.url), QUICK)
        async with connection:
            script = "redis.call('SET', KEYS[1], 'x') redis.call('SET', KEYS[2], 'x') return #KEYS"
            for fleet in "abcdef":
                tag = f"{{tg1:{fleet}}}"
                assert await connection.run("EVAL", script, 2, f"{tag}:one", f"{tag}:two") == 2
            news = "{tg1:a}:news"
            subscription = await connection.subscribe(news)
            owner = cluster.owner(news)
            assert "sub=1" in str(owner.ask("CLIENT", "LIST", "TYPE", "pubsub"))
            for fleet in "abcdef":  # whichever node it is told to
                await connection.run("PUBLISH", f"{{tg1:{fleet}}}:other", "y")
            await connection.run("PUBLISH", news, "x")
            assert await _next(subscription) == Message(news, b"x")
            owner.kill()
            await _until_broken(subscription)
            assert await _works_again(connection, "EVAL", script, 2, "{tg1:a}:one", "{tg1:a}:two") == 2
            subscription = await connection.subscribe(news)
            await connection.run("PUBLISH", news, "x")
            assert await _next(subscription) == Message(news, b"x")
            await subscription.close()


class Slow:
    """A way to a server on which every answer takes `delay_s`, in the test's own loop."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._port = port
        self._delay_s = delay_s

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, questions, 0.0))
                group.create_task(self._pass(answers, writer, self._delay_s))
        except* ConnectionError:
            pass
        finally:
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        while chunk := await reader.read(65536):
            await asyncio.sleep(delay_s)
            writer.write(chunk)
        writer.close()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        """Gives the port to connect to."""
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            yield server.sockets[0].getsockname()[1]


async def _first_answer(connection: Connection, timeout_s: float) -> object:
    """What callers that give up after `timeout_s` get in the end."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    return await connection.run("EVAL", "return 'done'", 1, "key")
            except TimeoutError:
                continue


async def test_a_connection_that_takes_longer_to_open_than_callers_wait_is_opened(server: DataServer) -> None:
    """Opening takes three answers (name, login, database), a command one."""
    server.ask("CONFIG", "SET", "requirepass", "secret")
    server.options = Options(password="secret")
    async with (
        Slow(server.port, 0.1).open() as port,
        connect(parse_url(f"redis://:secret@127.0.0.1:{port}/1")) as connection,
    ):
        assert await _first_answer(connection, 0.25) == b"done"


async def test_a_look_at_the_cluster_that_takes_longer_than_callers_wait_is_finished(tmp_path: Path) -> None:
    """The way to the node that is asked for the topology is slow; the nodes themselves are not."""
    async with (
        DataCluster(Kind.REDIS, tmp_path, size=1) as cluster,
        Slow(cluster.servers[0].port, 0.2).open() as port,
        connect(parse_url(f"redis+cluster://127.0.0.1:{port}")) as connection,
    ):
        assert await _first_answer(connection, 0.3) == b"done"


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster"])
async def test_closing_ends_what_is_under_way(scheme: str, tmp_path: Path) -> None:
    async with DataServer(Kind.REDIS, tmp_path) as server:
        server.pause()
        connection = connect(parse_url(f"{scheme}://127.0.0.1:{server.port}"), ConnectOptions(timeout_s=30.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connection.run("EVAL", "return 1", 0)
        await connection.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await connection.close()


async def test_what_is_never_used_opens_nothing() -> None:
    for deployment in Deployment:
        url = {
            Deployment.SERVER: "redis://127.0.0.1:1",
            Deployment.SOCKET: "unix:///none",
            Deployment.SENTINEL: "redis+sentinel://127.0.0.1:1/main",
            Deployment.CLUSTER: "redis+cluster://127.0.0.1:1",
        }[deployment]
        address = parse_url(url)
        assert isinstance(address, Address)
        async with connect(address) as connection:
            with pytest.raises(ERRORS):
                await connection.run("EVAL", "return 1", 0)
