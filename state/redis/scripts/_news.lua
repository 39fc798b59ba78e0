-- What is told to all replicas (state/redis/mirror.py reads it).

-- When this state began: a store that was emptied has another one.
local function era_of(meta_key, now)
  local born = redis.call('HGET', meta_key, 'born')
  if not born then
    born = string.format('%.0f', now)
    redis.call('HSET', meta_key, 'born', born)
  end
  return tonumber(born)
end

-- Epochs rise over restarts, emptied stores and lost writes alike: never below the time, never below the last.
local function next_epoch(meta_key, now, known)
  local last = tonumber(redis.call('HGET', meta_key, 'epoch') or 0)
  local epoch = math.max(last + 1, now, (known or 0) + 1)
  redis.call('HSET', meta_key, 'epoch', string.format('%.0f', epoch))
  return epoch
end

-- Messages are numbered without gaps, so a reader sees when it missed one.
local function tell(meta_key, channel, now, news)
  news.era = era_of(meta_key, now)
  news.n = redis.call('HINCRBY', meta_key, 'news', 1)
  redis.call('PUBLISH', channel, cjson.encode(news))
end
