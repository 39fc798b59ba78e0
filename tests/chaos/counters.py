"""What the store counts, read field by field with a script of its own: nothing of the gateway's code is used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import orjson
from redis import Redis
from redis.exceptions import RedisError

from tests.chaos.stand import FLEET, Stand

_POLL_S = 0.05
# A fleet's keys: `state/redis/keys.py` has their names, `_parts.lua` what is in them.
_PREFIX = f"{{tg1:{FLEET}}}:"
_SCRIPT = """
local prefix = ARGV[1]
local counted = {}
local all = redis.call('HGETALL', prefix .. 'load')
for i = 1, #all, 2 do
  local kind = string.sub(all[i], 1, 1)
  local values = {cmsgpack.unpack(all[i + 1])}
  local sum = 0
  if kind == 's' then
    for place = 5, 8 do sum = sum + math.abs(values[place]) end
    for _, count in pairs(values[9]) do sum = sum + count end
  elseif kind == 'r' then
    for place = 1, 8 do sum = sum + math.abs(values[place]) end
    for side = 13, 14 do
      for _, count in pairs(values[side]) do sum = sum + count end
    end
  elseif kind == 'p' then
    for _, count in pairs(values[1]) do sum = sum + count end
  end
  if sum ~= 0 then
    counted[#counted + 1] = {all[i], sum}
  end
end
local held = redis.call('HLEN', prefix .. 'held')
if held > 0 then
  counted[#counted + 1] = {'held', held}
end
for _, key in ipairs(redis.call('KEYS', prefix .. 'leases:*')) do
  local leases = redis.call('HLEN', key) - redis.call('HEXISTS', key, '')
  if leases > 0 then
    counted[#counted + 1] = {key, leases}
  end
end
local orphans = redis.call('ZCARD', prefix .. 'orphans')
return cjson.encode({counted = counted, backends = #all, orphans = orphans})
"""


@dataclass(frozen=True, slots=True)
class Counters:
    """Every counter that is not zero, by its name. `fields`: how many fields there were to look at."""

    left: Mapping[str, float]
    fields: int


def read_counters(client: Redis) -> Counters:
    """Raises RedisError."""
    # redis-py types answers of scripts as a union with awaitables.
    answer = orjson.loads(cast("str", client.eval(_SCRIPT, 0, _PREFIX)))
    left = {name: float(value) for name, value in answer["counted"] or ()}
    return Counters(left, int(answer["backends"]))


@dataclass(frozen=True, slots=True)
class Settled:
    """How long it took until every counter was zero; `left` is what was not, when the time was up."""

    seconds: float
    left: Mapping[str, float]
    fields: int


async def wait_zero(stand: Stand, within_s: float) -> Settled:
    """Look until all is zero, at most so long."""
    assert stand.store is not None
    began_s = time.monotonic()
    with stand.store.server.admin() as client:
        while True:
            try:
                counters = await asyncio.to_thread(read_counters, client)
            except RedisError as error:
                counters = Counters({f"the store does not answer: {error}": 1.0}, 0)
            seconds = time.monotonic() - began_s
            if not counters.left or seconds > within_s:
                return Settled(seconds, counters.left, counters.fields)
            await asyncio.sleep(_POLL_S)
