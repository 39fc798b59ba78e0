"""The SGLang adapter, in front of a fake SGLang (`fake_sglang`). No model is inside, and no SGLang."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import orjson
import pytest

from adapters.contract import Capabilities, Failure, OutgoingRequest, Support, Unsupported, UpstreamError
from adapters.registry import AdapterOptions, detect, make
from adapters.sglang import MOST_URGENT, SglangAdapter
from tests.adapters.fake_sglang import FakeSglang, Habits, Limits, fake_sglang

from .conftest import Connect, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "a b c"}]
LONG = 201  # the seed of an answer of thousands of tokens


def outgoing(path: str, body: Mapping[str, object], **more: object) -> OutgoingRequest:
    fields: dict[str, object] = {"headers": {}, "request_id": "r-1", "streamed": True, **more}
    return OutgoingRequest(path=path, body=orjson.dumps(body), **fields)  # type: ignore[arg-type]  # vary by test


async def exchange(
    adapter: SglangAdapter, path: str, body: Mapping[str, object], **more: object
) -> tuple[int, bytes]:
    response = await adapter.upstream.open(adapter.prepare(outgoing(path, body, **more)))
    try:
        return response.status, await response.read_all(1 << 20)
    finally:
        response.release()


def sent(adapter: SglangAdapter, path: str, body: Mapping[str, object], **more: object) -> dict[str, object]:
    return dict(orjson.loads(adapter.prepare(outgoing(path, body, **more)).body))


class TestProbe:
    async def test_what_it_tells(self, connect: Connect) -> None:
        limits = Limits(max_running_requests=24, chunked_prefill_size=512, context_tokens=1024, kv_tokens=8192)
        async with fake_sglang("org/tiny", limits=limits) as fake:
            found = await SglangAdapter(connect(fake.url)).probe()
            assert fake.bodies == []
            assert "/health" not in fake.asked
            assert fake.sets == [{"pp_max_micro_batch_size": 24}]
        assert found == Capabilities(
            engine="sglang",
            version="0.5.23",
            emulated=True,
            models=("org/tiny",),
            max_model_tokens=1024,
            kv_tokens=8192,
            block_tokens=16,
            max_running_seqs=24,
            max_batched_tokens=512,
            priority=Support.NO,
            tokenize=Support.YES,
            abort_by_id=Support.YES,
            continuous_usage=Support.YES,
            chunk_budget=Support.NO,
            running_cap=Support.YES,
            load=Support.YES,
            tokens_per_event=None,
            lingers=True,
            prefill_interval=0,
        )

    async def test_whether_decodes_wait_for_prompts(self, connect: Connect) -> None:
        """As it was started; the plug-in's word counts before that."""
        asked = [
            (Habits(), 0), (Habits(interval=3), 3), (Habits(mixed=True, interval=3), None),
            (Habits(plugin=True, interval=2), 2), (Habits(plugin=True, mixed=True), None),
            (Habits(plugin=True, mixed=False, says_mixed=True), 0),
        ]  # fmt: skip
        for habits, expected in asked:
            async with fake_sglang(habits=habits) as fake:
                assert (await SglangAdapter(connect(fake.url)).probe()).prefill_interval == expected, habits
        found = Capabilities("sglang", prefill_interval=0)
        assert (found.interval_with(None), found.interval_with(512)) == (0, 1)
        assert Capabilities("sglang", prefill_interval=4).interval_with(512) == 4
        assert Capabilities("sglang").interval_with(512) is None

    async def test_ranks_count_together(self, connect: Connect) -> None:
        limits = Limits(max_running_requests=12, kv_tokens=4096, ranks=2, stages=3)
        async with fake_sglang(limits=limits) as fake:
            adapter = SglangAdapter(connect(fake.url))
            found = await adapter.probe()
            assert (found.max_running_seqs, found.kv_tokens, fake.cap) == (24, 8192, 4)
            await adapter.set_running_cap(13)
            assert fake.cap == 2
            await adapter.set_running_cap(999)
            assert fake.cap == 4
            with pytest.raises(Unsupported, match="fewer than 6"):
                await adapter.set_running_cap(5)

    async def test_a_cap_in_force_is_not_taken_for_what_it_can_run(self, connect: Connect) -> None:
        async with fake_sglang(limits=Limits(max_running_requests=24)) as fake:
            fake.cap = 5
            adapter = SglangAdapter(connect(fake.url))
            assert (await adapter.probe()).max_running_seqs == 24
            assert fake.cap == 5
            await adapter.set_running_cap(None)
            assert fake.cap == 24

    async def test_a_server_whose_settings_want_another_key(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(admin_only=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            found = await adapter.probe()
            assert (found.running_cap, found.abort_by_id) == (Support.NO, Support.NO)
            for verb in (adapter.set_running_cap(3), adapter.set_chunk_budget(64), adapter.abort("r")):
                with pytest.raises(Unsupported):
                    await verb
            assert "rid" not in sent(adapter, CHAT, {"messages": MESSAGES})

    async def test_it_says_nothing(self, connect: Connect) -> None:
        """A server that has models only: an old or a guarded one."""
        async with fake_sglang(habits=Habits(loads=False, metrics=False)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            found = await adapter.probe()
            assert found.load is Support.NO
            with pytest.raises(UpstreamError):
                await adapter.read_load()
            assert await adapter.read_pace() is None

    async def test_nobody_there(self, connect: Connect) -> None:
        adapter = SglangAdapter(connect("http://127.0.0.1:1"))
        with pytest.raises(UpstreamError):
            await adapter.probe()
        assert not await adapter.healthy()

    async def test_it_is_detected(self) -> None:
        async with fake_sglang() as fake:
            adapter = await detect(fake.url)
            assert type(adapter) is SglangAdapter
            await adapter.close()
            made = make("sglang", fake.url, AdapterOptions(api_key="k"))
            assert type(made) is SglangAdapter
            await made.close()

    @pytest.mark.parametrize(("version", "ready"), [("0.5.23", True), ("0.5.23", False), ("0.5.12", True)])
    async def test_health_is_never_a_generation(self, connect: Connect, version: str, ready: bool) -> None:
        async with fake_sglang(habits=Habits(version=version, ready=ready)) as fake:
            assert await SglangAdapter(connect(fake.url)).healthy() is ready
            assert "/health" not in fake.asked


class TestKnobs:
    async def test_the_running_cap_holds_back_newcomers(self, connect: Connect) -> None:
        async with fake_sglang(step_s=0.005) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            await adapter.set_running_cap(2)
            body = {"messages": MESSAGES, "max_tokens": 3000, "stream": True, "seed": LONG}
            calls = [adapter.prepare(outgoing(CHAT, body, request_id=f"r-{number}")) for number in range(4)]
            async with asyncio.TaskGroup() as tasks:
                opening = [tasks.create_task(adapter.upstream.open(call)) for call in calls]
                await until(lambda: fake.engine.running == 2 and fake.engine.waiting == 2)
                load = await adapter.read_load()
                assert load.running is not None
                await adapter.set_running_cap(4)
                steps = fake.engine.steps
                await until(lambda: fake.engine.steps > steps + 3)
                assert fake.engine.running == 2, "it shows when one of them leaves"
                next(one for one in opening if one.done()).result().abort()
                await until(lambda: fake.engine.running == 3)
            for one in opening:
                one.result().abort()
            await until(lambda: not fake.requests)

    @pytest.mark.parametrize(("mixed", "told"), [(False, False), (False, True), (True, False)])
    async def test_prompts_go_first(self, connect: Connect, mixed: bool, told: bool) -> None:
        """Unless chunks are mixed, or steps of decodes are asked for between them, which a chunk budget does."""
        habits, limits = Habits(plugin=True, mixed=mixed), Limits(chunked_prefill_size=64)
        async with fake_sglang(habits=habits, limits=limits, step_s=0.005) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            if told:
                await adapter.set_chunk_budget(32)
            body = {"messages": MESSAGES, "max_tokens": 3000, "stream": True, "seed": LONG}
            stream = await adapter.upstream.open(adapter.prepare(outgoing(CHAT, body)))
            long = {"prompt": "a " * 640, "max_tokens": 1, "stream": True, "seed": 1}
            async with asyncio.TaskGroup() as tasks:
                task = tasks.create_task(exchange(adapter, COMPLETIONS, long))
                await until(lambda: fake.engine.waiting > 0 or bool(fake.engine.prompts))
                alone = fake.engine.moments[0]
                await until(lambda: fake.engine.prefill_tokens >= 640 or task.done())
                alone = fake.engine.moments[0] - alone
            assert alone >= 18 if told else alone <= 3
            stream.abort()
            await until(lambda: not fake.requests)

    async def test_without_the_plugin_the_chunk_is_as_it_was_started(self, connect: Connect) -> None:
        for habits in (Habits(), Habits(says_true=True)):  # 0.5.12 says that it took what it did not
            async with fake_sglang(habits=habits) as fake:
                adapter = SglangAdapter(connect(fake.url))
                assert (await adapter.probe()).chunk_budget is Support.NO
                with pytest.raises(Unsupported, match="plug-in"):
                    await adapter.set_chunk_budget(256)
                assert not any("chunked_prefill_size" in one for one in fake.sets)

    async def test_with_the_plugin_it_is_set(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(plugin=True), limits=Limits(chunked_prefill_size=1024)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            found = await adapter.probe()
            assert (found.chunk_budget, found.max_batched_tokens) == (Support.YES, 1024)
            for asked, taken in ((300, 288), (1, 16), (99_999, 1024), (64, 64), (None, 1024)):
                await adapter.set_chunk_budget(asked)
                assert (fake.chunk, fake.interval) == (taken, 0 if asked is None else 1)

    async def test_mixed_chunks_need_no_decodes_in_between(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(plugin=True, mixed=True, version="0.5.12")) as fake:
            adapter = SglangAdapter(connect(fake.url))
            assert (await adapter.probe()).chunk_budget is Support.YES
            await adapter.set_chunk_budget(128)
            assert fake.sets[-1] == {"chunked_prefill_size": 128}

    async def test_a_size_that_would_protect_nobody_is_none(self, connect: Connect) -> None:
        """Chunks with steps of their own, in a version that runs one behind the other."""
        async with fake_sglang(habits=Habits(plugin=True, version="0.5.12")) as fake:
            adapter = SglangAdapter(connect(fake.url))
            assert (await adapter.probe()).chunk_budget is Support.NO
            with pytest.raises(Unsupported):
                await adapter.set_chunk_budget(128)

    async def test_a_budget_in_force_outlives_a_probe(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(plugin=True)) as fake:
            await (first := SglangAdapter(connect(fake.url))).probe()
            await first.set_chunk_budget(128)
            found = await SglangAdapter(connect(fake.url)).probe()
            assert (fake.chunk, found.max_batched_tokens) == (128, 2048)

    async def test_a_refusal_is_told(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(plugin=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            fake.behave(plugin=False)  # it was started again without
            with pytest.raises(UpstreamError, match="chunked_prefill_size of 64") as caught:
                await adapter.set_chunk_budget(64)
            assert caught.value.failure is Failure.REJECTED


class TestLoad:
    async def test_loads(self, connect: Connect) -> None:
        async with fake_sglang(limits=Limits(ranks=2), step_s=0.03) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            assert (await adapter.read_load()).running == 0
            body = {"messages": MESSAGES, "stream": True, "seed": LONG}
            response = await adapter.upstream.open(adapter.prepare(outgoing(CHAT, body)))
            assert (await adapter.read_load()).running == 0, "a snapshot is as old as it is"
            async with asyncio.timeout(10):
                while (load := await adapter.read_load()).running == 0:
                    pass
            assert (load.running, load.waiting, load.waiting_tokens) == (2, 0, 0)
            assert load.age_s is not None
            assert load.age_s >= 0.0
            response.abort()
            await until(lambda: not fake.requests)

    async def test_the_keys_of_its_first_version(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(version="0.5.9", old_loads=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            load = await adapter.read_load()
            assert (load.running, load.waiting, load.waiting_tokens, load.age_s) == (0, 0, None, None)
            assert await adapter.read_pace() is None
            pace = await adapter.read_pace()
            assert pace is not None
            assert (pace.decode, pace.prefill_token_s) == (None, None)

    async def test_metrics_where_there_is_nothing_else(self, connect: Connect) -> None:
        """The queue is told once for each priority too, which must not count again."""
        async with fake_sglang(habits=Habits(loads=False, priority=True), step_s=0.005) as fake:
            adapter = SglangAdapter(connect(fake.url))
            assert (await adapter.probe()).load is Support.YES
            await adapter.set_running_cap(1)
            body = {"messages": MESSAGES, "stream": True, "seed": LONG}
            async with asyncio.TaskGroup() as tasks:
                calls = [adapter.prepare(outgoing(CHAT, body, request_id=str(one), left_ms=one)) for one in (1, 9)]
                opening = [tasks.create_task(adapter.upstream.open(call)) for call in calls]
                await until(lambda: fake.engine.running == 1 and fake.engine.waiting == 1)
                load = await adapter.read_load()
                assert (load.running, load.waiting) == (1, 1)
                await adapter.set_running_cap(2)
                await until(lambda: any(one.done() for one in opening))
                next(one for one in opening if one.done()).result().abort()
            for one in opening:
                one.result().abort()
            await until(lambda: not fake.requests)

    async def test_step_times_between_two_readings(self, connect: Connect) -> None:
        async with fake_sglang(step_s=0.001) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            assert await adapter.read_pace() is None
            for seed in range(3):
                status, _ = await exchange(adapter, CHAT, {"messages": MESSAGES, "max_tokens": 20, "seed": seed})
                assert status == 200
            await until(lambda: fake.engine.idle)
            pace = await adapter.read_pace()
            assert pace is not None
            assert pace.decode is not None
            assert pace.prefill_token_s is not None
            assert pace.decode.steps == fake.engine.moments[0]
            assert pace.decode.mean_seqs == 1.0
            assert pace.decode.line is None  # one batch size tells no slope
            assert pace.prefill_token_s * 1e6 == pytest.approx(fake.engine.prefill_us / fake.engine.prefill_tokens)


class TestPrepare:
    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_ids_are_of_one_length_whatever_the_client_says(self, connect: Connect, path: str) -> None:
        async with fake_sglang() as fake:
            adapter = SglangAdapter(connect(fake.url))
            raw = b'{ "messages" : [], "prompt": "a \\"rid\\": b" }'
            request = OutgoingRequest(path, {"X-Override-Rid": "theirs"}, raw, "r-1", True)
            assert adapter.prepare(request).body == raw
            await adapter.probe()
            names = {
                str(orjson.loads(adapter.prepare(OutgoingRequest(path, {}, raw, name, True)).body)["rid"])
                for name in ("r", "r-1", "r-10", "r-1\udcff", "x" * 500)
            }
            assert len(names) == 5
            assert len({len(name) for name in names}) == 1
            call = adapter.prepare(request)
            assert call.body.endswith(raw[1:])
            assert ("x-override-rid" in call.headers) is (path == CHAT)
            assert "theirs" not in call.headers.values()
            own = sent(adapter, path, {"rid": "mine", "messages": [], "prompt": "a", "n": 1})
            assert own == {"rid": own["rid"], "messages": [], "prompt": "a", "n": 1}
            assert len(str(own["rid"])) == len(names.pop())

    async def test_requests_that_clients_call_the_same_do_not_meet(self, connect: Connect) -> None:
        """A server refuses an id that is in flight already: a client's second try, say."""
        async with fake_sglang() as fake:
            ours, others = (SglangAdapter(connect(fake.url)) for _ in range(2))
            body = {"messages": MESSAGES, "max_tokens": 5}
            async with asyncio.TaskGroup() as tasks:
                for adapter in (ours, others):
                    await adapter.probe()
                    for _ in range(3):
                        tasks.create_task(exchange(adapter, CHAT, body, streamed=False))
            assert len({str(one["rid"]) for one in fake.seen}) == 6
            await until(lambda: fake.engine.idle)

    async def test_ids_are_not_kept_for_ever(self, connect: Connect) -> None:
        async with fake_sglang() as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            first = adapter.prepare(outgoing(CHAT, {}, request_id="first"))
            for number in range(9_000):
                adapter.prepare(outgoing(CHAT, {}, request_id=str(number)))
            known = len(fake.aborts)
            await adapter.abort("first")
            assert len(fake.aborts) == known, "it is long gone"
            await adapter.abort("8999")
            assert fake.aborts[-1] != orjson.loads(first.body)["rid"]

    @pytest.mark.parametrize("body", [{"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}, {"prompt": [[1], [2]]}])
    async def test_several_sequences_have_no_id_of_ours(self, connect: Connect, body: dict[str, object]) -> None:
        async with fake_sglang() as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            assert sent(adapter, COMPLETIONS, body) == body
            if "n" not in body:
                whole = {**body, "prompt": ["a", "b"], "max_tokens": 3}
                status, answer = await exchange(adapter, COMPLETIONS, whole, streamed=False)
                assert (status, len(orjson.loads(answer)["choices"])) == (200, 2)

    async def test_other_routes_keep_their_body(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(priority=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            call = adapter.prepare(
                outgoing("/v1/messages", {"messages": MESSAGES}, left_ms=100, due_ms=1_790_000_000_123)
            )
            assert orjson.loads(call.body) == {"messages": MESSAGES}
            assert call.headers["x-override-priority"] == str(MOST_URGENT)
            assert set(adapter.prepare(outgoing("/v1/embeddings", {"input": "a"})).headers) == {"x-request-id"}


class TestPriority:
    @pytest.mark.parametrize(
        ("habits", "support", "levels"),
        [
            (Habits(), Support.NO, None),
            (Habits(priority=True), Support.YES, [0, 1, 1, 2, 5, 7, 10, 10, 10]),
            (Habits(priority=True, threshold=None), Support.YES, [0, 1, 1, 2, 5, 7, 10, 10, 10]),
            (Habits(priority=True, threshold=5), Support.YES, [0, 1, 1, 1, 3, 4, 5, 5, 5]),
            (Habits(priority=True, threshold=0), Support.NO, None),
            (Habits(priority=True, low_first=True), Support.YES, [0, -1, -1, -2, -5, -7, -10, -10, -10]),
        ],
    )
    async def test_few_values_that_preempt_nobody(
        self, connect: Connect, habits: Habits, support: Support, levels: list[int] | None
    ) -> None:
        left_ms = [None, 10**9, 64_000, 32_000, 4_000, 1_000, 100, 0, -5_000]
        async with fake_sglang(habits=habits) as fake:
            adapter = SglangAdapter(connect(fake.url))
            assert (await adapter.probe()).priority is support
            body = {"messages": MESSAGES, "priority": 10**6}
            told = [sent(adapter, CHAT, body, left_ms=left)["priority"] for left in left_ms]
        assert told == (levels or [10**6] * len(left_ms))

    async def test_by_configuration(self) -> None:
        yes = make("sglang", "http://h", AdapterOptions(priority=Support.YES))
        assert orjson.loads(yes.prepare(outgoing(CHAT, {}, left_ms=1, due_ms=1_790_000_000_123)).body) == {
            "priority": MOST_URGENT
        }
        async with fake_sglang(habits=Habits(priority=True)) as fake:
            no = make("sglang", fake.url, AdapterOptions(priority=Support.NO))
            assert (await no.probe()).priority is Support.NO
            assert "priority" not in orjson.loads(
                no.prepare(outgoing(CHAT, {}, left_ms=1, due_ms=1_790_000_000_123)).body
            )
            await no.close()

    async def test_a_clients_priority_that_is_refused_is_not_an_overload(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(aborts_priority=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            body = {"messages": MESSAGES, "priority": 3}
            status, answer = await exchange(adapter, CHAT, body, streamed=False)
            assert adapter.response_failure(status, answer).failure is Failure.REJECTED
            _, answer = await exchange(adapter, CHAT, {**body, "stream": True})
            failure = adapter.stream_failure(answer)
            assert failure is not None
            assert failure.failure is Failure.REJECTED


class TestErrors:
    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_a_full_queue(self, connect: Connect, path: str) -> None:
        prompt: dict[str, object] = {"prompt": "a"} if path == COMPLETIONS else {"messages": MESSAGES}
        async with fake_sglang(habits=Habits(overloaded=True)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            status, answer = await exchange(adapter, path, prompt, streamed=False)
            failure = adapter.response_failure(status, answer)
            assert (failure.failure, failure.status) == (Failure.OVERLOADED, 503)
            status, answer = await exchange(adapter, path, {**prompt, "stream": True})
            assert status == 200
            told = adapter.stream_failure(answer[: answer.index(b"\n\n") + 2])
            assert told is not None
            assert (told.failure, told.status) == (Failure.OVERLOADED, 503)
            assert str(told) == "The request queue is full."

    async def test_what_is_wrong_with_a_prompt_is_told_before_the_stream(self, connect: Connect) -> None:
        async with fake_sglang(limits=Limits(context_tokens=4)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            body = {"prompt": "a b c d e", "stream": True}
            status, answer = await exchange(adapter, COMPLETIONS, body)
            assert (status, adapter.response_failure(status, answer).failure) == (400, Failure.TOO_LONG)

    async def test_a_broken_generation(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(fails_after=0)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            _, answer = await exchange(adapter, CHAT, {"messages": MESSAGES, "stream": True})
            failure = adapter.stream_failure(answer)
            assert failure is not None
            assert (failure.failure, failure.status) == (Failure.BROKEN, 500)


class TestAbort:
    async def test_only_the_one_that_is_meant(self, connect: Connect) -> None:
        """Ids are matched by their beginning; the clients' own ones begin with one another here."""
        async with fake_sglang(step_s=0.005) as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            body = {"messages": MESSAGES, "stream": True, "seed": LONG, "max_tokens": 3_000}
            open_ones = {}
            for name in ("r-1", "r-10"):
                call = adapter.prepare(outgoing(CHAT, body, request_id=name))
                open_ones[name] = await adapter.upstream.open(call)
            await adapter.abort("r-1")
            answer = await open_ones["r-1"].read_all(1 << 20)
            assert b'"finish_reason":"abort"' in answer
            assert len(fake.requests) == 1
            assert all(len(rid) > 10 or rid == "tiergate-probe" for rid in fake.aborts)
            open_ones["r-10"].abort()
            await until(lambda: not fake.requests)

    async def test_one_that_is_unknown(self, connect: Connect) -> None:
        async with fake_sglang() as fake:
            adapter = SglangAdapter(connect(fake.url))
            await adapter.probe()
            await adapter.abort("nobody")


class TestCounting:
    @pytest.mark.parametrize(
        ("body", "tokens"),
        [
            ({"messages": MESSAGES, "temperature": 0}, 4),
            ({"prompt": "a b"}, 2),
            ({"prompt": ["a b c"]}, 3),
            ({"prompt": [5, 6, 7, 8]}, 4),
        ],
    )
    async def test_tokens(self, connect: Connect, body: dict[str, object], tokens: int) -> None:
        async with fake_sglang() as fake:
            assert await SglangAdapter(connect(fake.url)).count_tokens(body) == tokens

    async def test_events_that_carry_several(self, connect: Connect) -> None:
        async with fake_sglang(habits=Habits(merged=4)) as fake:
            adapter = SglangAdapter(connect(fake.url))
            options = {"include_usage": True, "continuous_usage_stats": True}
            body = {"messages": MESSAGES, "stream": True, "max_tokens": 12, "seed": 1, "stream_options": options}
            _, answer = await exchange(adapter, CHAT, body)
            events = [orjson.loads(one.removeprefix(b"data: ")) for one in answer.split(b"\n\n")[:-2]]
            told = [one["usage"]["completion_tokens"] for one in events if "usage" in one]
            assert told == [4, 8, 12, 12]


async def test_the_fake_would_generate_on_health() -> None:
    """So a test in which it is asked fails."""
    async with fake_sglang() as fake:
        with pytest.raises(AssertionError):
            await FakeSglang.health(fake, None)  # type: ignore[arg-type]  # it does not look at the request
