"""The vLLM adapter takes an emulated engine for vLLM, and knows that it is emulated."""

from __future__ import annotations

from adapters.contract import Support
from adapters.emulated import EmulatedEngine, EmulatedSettings, serving
from adapters.registry import detect
from tiergate_engine.model import EngineConfig
from tiergate_engine.steptime import RooflineStepTime


async def test_the_vllm_adapter_probes_it_as_vllm() -> None:
    config = EngineConfig(kv_tokens=6400, max_model_tokens=4096, block_tokens=32)
    engine = EmulatedEngine(EmulatedSettings("m", config), RooflineStepTime(c0_s=0.001))
    async with serving([engine]) as (served,):
        adapter = await detect(served.url)
        try:
            found = await adapter.probe()
            load = await adapter.read_load()
            assert await adapter.healthy()
            counted = await adapter.count_tokens(
                {"model": "m", "messages": [{"role": "user", "content": "a b c"}]}
            )
        finally:
            await adapter.close()
    assert (found.engine, found.emulated, found.models) == ("vllm", True, ("m",))
    assert (found.max_model_tokens, found.kv_tokens, found.block_tokens) == (4096, 6400, 32)
    assert (found.priority, found.tokenize, found.load) == (Support.NO, Support.YES, Support.YES)
    assert found.tokens_per_event == 1
    assert (load.running, load.waiting, load.kv_used_fraction, load.preemptions) == (0, 0, 0.0, 0)
    assert counted == 4
