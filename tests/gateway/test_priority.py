"""What an engine that schedules by priority is told: when the first token is due, by a clock that all share."""

from __future__ import annotations

import asyncio
import time

from tests.gateway.rig import client, engine, gateway, settings_for

_LEAST_URGENT = 2**63 - 1


async def test_the_earliest_deadline_comes_first_whenever_it_was_sent() -> None:
    """Two gateways, and requests sent one after the other: time left alone would put the later one level."""
    async with engine() as one:
        async with (
            gateway(settings_for(one)) as first,
            gateway(settings_for(one)) as second,
            client(first) as ask,
            client(second) as other,
        ):
            for asking, tier in ((ask, "chat"), (other, "chat"), (ask, "fast"), (ask, "batch")):
                assert (await asking.read_chat(headers={"x-slo-tier": tier}))[0] == 200
                await asyncio.sleep(0.02)
        told = [
            int({name.lower(): value for name, value in headers.items()}["x-vllm-priority"])
            for headers in one.headers
        ]
        chat, later_chat, fast, batch = told
        assert chat < later_chat, "the one that was sent first is due first"
        assert fast < chat, "one that is due before all of them overtakes"
        assert batch == _LEAST_URGENT, "nothing was promised to it"
        assert abs(chat / 1e3 - time.time()) < 3_600, "milliseconds by the wall clock"
