"""Two real vLLM on CPU, both driven: one computes prompts, the other answers. `python -m bench.engine_pair`

The first engine gets a chunk budget and sends the prompt's KV to the second over loopback (NIXL), by the steps of
vLLM's disaggregation: `do_remote_decode` to the one, and what it answers to the other. Said is what each engine's
own account of its steps shows, and whether the text is the same as from one engine alone. Exit code 1 when not.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import uvloop

from adapters import registry
from adapters.vllm import VllmAdapter
from deploy.server_process import free_port
from deploy.vllm_cpu import server as engines
from deploy.vllm_cpu.transfer import add_transfer
from tiergate_engine.control import Mode, Orders, Promise
from tiergate_engine.drive import Rules
from tiergate_engine.steptime import RooflineStepTime

CHUNK_TOKENS = 64
PROMPTS = (100, 1000, 4000)
ANSWER_TOKENS = 24
PROFILE = RooflineStepTime(c0_s=5e-3, per_token_s=3e-5, per_seq_s=1e-4, per_attention_s=2e-8)
_SEND = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

Answer = dict[str, object]


async def ask(session: aiohttp.ClientSession, url: str, prompt: Sequence[int], **fields: object) -> Answer:
    """A completion, greedy, of a given length."""
    body = {"model": engines.MODEL_NAME, "prompt": list(prompt), "temperature": 0, "ignore_eos": True, **fields}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        read: Answer = await answer.json()
    return read


def text_of(answer: Answer) -> object:
    """The answer's text."""
    choices = answer["choices"]
    assert isinstance(choices, list)
    return choices[0]["text"]


async def driven(url: str, orders: Orders) -> VllmAdapter:
    """The adapter to an engine that took the orders."""
    adapter = await registry.detect(url)
    assert isinstance(adapter, VllmAdapter)
    await adapter.probe()
    await adapter.give_orders(orders)
    return adapter


async def exchange(prefill_url: str, decode_url: str) -> bool:
    """Send prompts through both engines; whether all went as it should."""
    prefill = await driven(prefill_url, Orders(chunk_tokens=CHUNK_TOKENS))
    decode = await driven(decode_url, Orders(Mode.DRIVEN, PROFILE, Rules()))
    chance = random.Random(1)
    well = True
    async with aiohttp.ClientSession() as session:
        for tokens in PROMPTS:
            prompt = [chance.randrange(50, 450) for _ in range(tokens)]
            alone = await ask(session, decode_url, prompt, max_tokens=ANSWER_TOKENS)
            since = [(await adapter.read_state()).steps for adapter in (prefill, decode)]
            sent = await ask(session, prefill_url, prompt, max_tokens=1, kv_transfer_params=_SEND)
            answer = await ask(
                session,
                decode_url,
                prompt,
                max_tokens=ANSWER_TOKENS,
                kv_transfer_params=sent["kv_transfer_params"],
                vllm_xargs=Promise(2.0, 0.1).to_xargs(),
            )
            first, second = [
                [fact.step.prefill_tokens for fact in (await adapter.read_steps(number)).facts]
                for adapter, number in zip((prefill, decode), since, strict=True)
            ]
            same = text_of(answer) == text_of(alone)
            obeyed = max(first) <= CHUNK_TOKENS and sum(first) == tokens
            well = well and same and obeyed and sum(second) <= 1
            print(
                f"{tokens} tokens: in {sum(1 for chunk in first if chunk)} steps of at most {max(first)}, "
                f"{sum(second)} of them again by the other engine; the text is {'the same' if same else 'ANOTHER'}"
            )
        states = [await adapter.read_state() for adapter in (prefill, decode)]
    for name, adapter, state in zip(("prefill", "decode"), (prefill, decode), states, strict=True):
        print(f"{name}: {state.mode.value}, {state.steps} steps, {state.failures} plans failed")
        await adapter.close()
    return well and not any(state.failures for state in states)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_pair", description=__doc__)
    parser.parse_args(argv)
    programs, model = engines.prepare()
    add_transfer(programs / "python")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        urls = []
        servers = []
        for number in range(2):
            port = free_port()
            server = engines.vllm_server(
                programs,
                model,
                port,
                Path(folder) / f"vllm{number}.log",
                driven=True,
                cpus=str(number),
                transfer_port=free_port(),
            )
            running.callback(server.stop)
            server.launch()
            servers.append(server)
            urls.append(f"http://127.0.0.1:{port}")
        for server in servers:
            server.wait_ready()
        return 0 if uvloop.run(exchange(*urls)) else 1


if __name__ == "__main__":
    sys.exit(main())
