"""What is learned: token ratios, step times, lengths; and that it survives a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters.contract import Capabilities
from gateway.config import BackendSettings, TokenSettings
from gateway.learning import Learned, Lengths
from gateway.pace import StepSample
from gateway.tokens import FileTokenizer, PromptText, TokenCounter
from tests.gateway.rig import PROFILE, client, engine, gateway, settings_for, settled

_BACKEND = BackendSettings(url="http://a:1", name="a", profile=PROFILE)


def _tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415  (slow to import)

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


async def test_a_configured_tokenizer_is_exact(tmp_path: Path) -> None:
    counter = TokenCounter(TokenSettings(), {"m": FileTokenizer(_tokenizer(tmp_path))})
    for words in (7, 9_000):  # the long one is counted in a thread
        text = PromptText()
        text.add_text("a " * words)
        assert await text.tokens("m", counter) == words
        assert await text.tokens("other", counter) == pytest.approx(words / 2, rel=0.01, abs=1)


def test_the_ratio_is_learned_from_usage() -> None:
    counter = TokenCounter(TokenSettings(), {})
    assert counter.estimate("m", 4_000) == 1_000
    for _ in range(300):
        counter.learn("m", 1_000, 500)
    assert counter.estimate("m", 4_000) == pytest.approx(2_000, rel=0.02)
    assert counter.estimate("other", 4_000) == 1_000
    assert counter.estimate("m", 0) == 0


async def test_steps_are_corrected_and_saved(tmp_path: Path) -> None:
    path = tmp_path / "learned.json"
    counter = TokenCounter(TokenSettings(), {})
    learned = await asyncio.to_thread(Learned, counter, path)
    steps = await learned.steps(_BACKEND, Capabilities("vllm"))
    before = steps.timing()
    expected_s = before.step_time.decode_seconds(8, 8_000)
    for _ in range(200):
        steps.observe(StepSample("a", 2 * expected_s, 8, 8_000))
    after = steps.timing()
    assert after.version > before.version
    assert after.step_time.decode_seconds(8, 8_000) == pytest.approx(2 * expected_s, rel=0.05)
    assert steps.timing() is after
    for _ in range(200):
        learned.lengths.observe("m", "chat", 10, complete=True)
    [(model, tier, lengths)] = learned.lengths.changed({})
    assert (model, tier) == ("m", "chat")
    assert learned.lengths.changed({}) == []
    counter.learn("m", 1_000, 500)
    await learned.save()

    later = TokenCounter(TokenSettings(), {})
    again = await asyncio.to_thread(Learned, later, path)
    steps = await again.steps(_BACKEND, Capabilities("vllm"))
    assert steps.timing().step_time.decode_seconds(8, 8_000) == pytest.approx(2 * expected_s, rel=0.05)
    assert again.lengths.book.snapshot("m", "chat").remaining(0) == pytest.approx(lengths.remaining(0))
    assert later.estimate("m", 4_000) == counter.estimate("m", 4_000)


def test_long_answers_that_still_run_are_not_forgotten() -> None:
    """A run that has just begun: short answers have ended, the long ones of the same class have not."""
    alone, together = Lengths(), Lengths()
    for lengths in (alone, together):
        for _ in range(20):
            lengths.observe("m", "chat", 20, complete=True)
    [(_, _, short)] = alone.changed({})
    [(_, _, fair)] = together.changed({("m", "chat"): [400] * 20})
    assert fair.remaining(0) > 2 * short.remaining(0)
    [(_, _, later)] = together.changed({("m", "chat"): [800] * 20})  # nothing ended, but they go on
    assert later.remaining(0) > fair.remaining(0)
    [(_, _, after)] = together.changed({})  # nothing runs any more: it is told once
    assert after.remaining(0) == pytest.approx(short.remaining(0))
    assert together.changed({}) == []


async def test_an_uncalibrated_backend_becomes_calibrated() -> None:
    learned = Learned(TokenCounter(TokenSettings(), {}), None)
    bare = BackendSettings(url="http://a:1", name="a")
    steps = await learned.steps(bare, Capabilities("vllm", kv_tokens=1234, max_running_seqs=5))
    assert not steps.timing().calibrated
    assert (steps.limits.kv_tokens, steps.limits.max_running_seqs) == (1234, 5)
    for _ in range(250):
        steps.observe(StepSample("a", 0.02, 4, 400))
    assert steps.timing().calibrated


async def test_live_streams_teach_ratio_and_lengths() -> None:
    async with engine() as one, gateway(settings_for(one)) as made, client(made) as ask:
        for _ in range(3):
            await ask.read_chat()
        await settled(made)
        # 11 characters were 11 tokens by the engine's usage, so the estimate moves from 4 towards 1 a token.
        assert made.counter.estimate("test-model", 4_000) > 1_000


async def test_an_engine_counts_tokens_when_asked() -> None:
    async with engine() as one, gateway(settings_for(one, tokens={"engine": True})) as made, client(made) as ask:
        async with ask.chat(headers={"x-request-id": "counted"}) as answer:
            await answer.read()
        assert await made.fleet.count_tokens("test-model", {"model": "test-model", "prompt": "x"}) == 3
        assert await made.fleet.count_tokens("nobody", {}) is None
