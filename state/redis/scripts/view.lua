-- Everything, as JSON.
-- KEYS: load, replicas, orphans, held, meta.
local now = clock_ms()
local standings, parts, held = {}, {}, {}
local all = redis.call('HGETALL', KEYS[1])
local by_backend = {}
for i = 1, #all, 2 do
  if string.sub(all[i], 1, 2) == 's|' then
    local backend = string.sub(all[i], 3)
    local standing = read_packed(all[i + 1])
    by_backend[backend] = standing
    local tightest = standing[4]
    if tightest == math.huge then
      tightest = cjson.null
    end
    standings[#standings + 1] = {
      backend, standing[1], standing[3], standing[5], standing[6], standing[7], standing[8], tightest, standing[9],
    }
  end
end
for i = 1, #all, 2 do
  local replica, backend = string.match(all[i], '^r|([^|]*)|(.*)$')
  if replica and by_backend[backend] then
    local part = read_packed(all[i + 1])
    local one = told(backend, replica, by_backend[backend], part, now)
    one[11], one[12] = part[9], part[8]
    parts[#parts + 1] = one
  end
end
local holding = redis.call('HGETALL', KEYS[4])
for i = 1, #holding, 2 do
  local at, text = cmsgpack.unpack(holding[i + 1])
  held[#held + 1] = {holding[i], text, math.max(now - at, 0)}
end
local silent = {}
local beats = redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
for i = 1, #beats, 2 do
  silent[#silent + 1] = {beats[i], now - tonumber(beats[i + 1])}
end
return cjson.encode({
  era = era_of(KEYS[5], now),
  epoch = tonumber(redis.call('HGET', KEYS[5], 'epoch') or 0),
  n = tonumber(redis.call('HGET', KEYS[5], 'news') or 0),
  standings = standings,
  parts = parts,
  held = held,
  replicas = silent,
  orphans = redis.call('ZRANGE', KEYS[3], 0, -1),
})
