"""A second real engine with other habits: `transformers serve`, through the generic OpenAI adapter.

It lists no models, its streams end without [DONE], and it has no metrics; the model's name is a path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from deploy.server_process import free_port
from deploy.vllm_cpu import server as engines
from tests.conftest import StartServer
from tests.real_engine.conftest import EngineFiles, RealEngine, RealGateway

CHAT: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Bada koru meni."}]


@pytest.fixture(scope="module")
def transformers(
    engine_files: EngineFiles, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[RealEngine]:
    request.getfixturevalue("starting")  # the other tests' engine starts meanwhile
    port = free_port()
    folder = tmp_path_factory.mktemp("transformers")
    log = folder / "transformers.log"
    with engines.transformers_server(engine_files.programs, engine_files.model, port, log, folder / "cache"):
        yield RealEngine(f"http://127.0.0.1:{port}", str(engine_files.model), log, engine_files)


@pytest.fixture
def gateway(transformers: RealEngine, start_server: StartServer, tiergate_command: list[str]) -> RealGateway:
    port = free_port()
    backend = f"{transformers.url},engine=openai,model={transformers.model}"
    start_server(
        [*tiergate_command, "serve", "--backend", backend, "--port", str(port)], port, ready_path="/readyz"
    )
    return RealGateway(f"http://127.0.0.1:{port}")


@pytest.fixture
async def client(gateway: RealGateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


async def _streamed(client: openai.AsyncOpenAI, model: str) -> str:
    stream = await client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=20, temperature=0, stream=True
    )
    return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])


async def test_a_stream_without_done_and_a_whole_answer(
    client: openai.AsyncOpenAI, transformers: RealEngine
) -> None:
    assert [model.id async for model in client.models.list()] == [transformers.model]
    whole = await client.chat.completions.create(
        model=transformers.model, messages=CHAT, max_tokens=20, temperature=0
    )
    assert whole.choices[0].message.content
    assert await _streamed(client, transformers.model) == whole.choices[0].message.content


async def test_its_streams_through_the_gateway_are_its_own(
    client: openai.AsyncOpenAI, transformers: RealEngine
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{transformers.url}/v1", api_key="unused") as direct:
        assert await _streamed(client, transformers.model) == await _streamed(direct, transformers.model)


async def test_an_unknown_model_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        await client.chat.completions.create(model="no-such-model", messages=CHAT, max_tokens=5)
