-- The fleet's document, and what its replicas learned (state/redis/documents.py).
-- KEYS: documents, learned, learned-at. ARGV: what to do, then what that needs.
-- A version is kept as "version\nwritten ms\nchange\npayload" under its number; `now` says which one stands.
local now = clock_ms()

local function standing()
  local version = redis.call('HGET', KEYS[1], 'now')
  return version and redis.call('HGET', KEYS[1], version)
end

local function header(entry)
  local version, written, change = string.match(entry, '^(%d+)\n(%d+)\n([^\n]*)\n')
  return tonumber(version), tonumber(written), change
end

local function stand(version, written, change, payload, keep, channel)
  local number = string.format('%.0f', version)
  local entry = table.concat({number, string.format('%.0f', written), change, payload}, '\n')
  redis.call('HSET', KEYS[1], number, entry, 'now', number)
  local versions = {}
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    if field ~= 'now' then versions[#versions + 1] = tonumber(field) end
  end
  table.sort(versions)
  for i = 1, #versions - keep do
    redis.call('HDEL', KEYS[1], string.format('%.0f', versions[i]))
  end
  redis.call('PUBLISH', channel, number)
  return entry
end

local does = {}

function does.read()
  return standing()
end

function does.stamp()
  local entry = standing()
  if not entry then return '' end
  local version, _, change = header(entry)
  return string.format('%.0f', version) .. ' ' .. change
end

-- ARGV: expected version, change, payload, versions to keep, channel
function does.put()
  local entry, version = standing(), 0
  if entry then
    local standing_version, _, change = header(entry)
    if change == ARGV[3] then return {1, entry} end
    version = standing_version
  end
  if version ~= tonumber(ARGV[2]) then return {0, entry} end
  return {1, stand(version + 1, now, ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6])}
end

-- ARGV: version, written ms, change, payload, versions to keep, channel
function does.put_back()
  local version, written, change = tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
  local entry = standing()
  if entry then
    local v, w, c = header(entry)
    local outranks = version > v or (version == v and (written < w or (written == w and change > c)))
    if not outranks then return entry end
  end
  return stand(version, written, change, ARGV[5], tonumber(ARGV[6]), ARGV[7])
end

function does.history()
  local entries = {}
  local fields = redis.call('HGETALL', KEYS[1])
  for i = 1, #fields, 2 do
    if fields[i] ~= 'now' then entries[#entries + 1] = fields[i + 1] end
  end
  return entries
end

-- ARGV: source, body, how long to keep contributions in ms, and how many
function does.contribute()
  redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
  redis.call('ZADD', KEYS[3], string.format('%.0f', now), ARGV[2])
  local until_ms = string.format('(%.0f', now - tonumber(ARGV[4]))
  local old = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', until_ms)
  for _, sources in ipairs({old, redis.call('ZRANGE', KEYS[3], 0, -1 - tonumber(ARGV[5]))}) do
    for _, source in ipairs(sources) do
      redis.call('HDEL', KEYS[2], source)
      redis.call('ZREM', KEYS[3], source)
    end
  end
  return 1
end

function does.contributions()
  local found = {}
  local times = redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')
  for i = 1, #times, 2 do
    local body = redis.call('HGET', KEYS[2], times[i])
    if body then
      found[#found + 1] = {times[i], string.format('%.0f', math.max(now - tonumber(times[i + 1]), 0)), body}
    end
  end
  return found
end

return does[ARGV[1]]()
