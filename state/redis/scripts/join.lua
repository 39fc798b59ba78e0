-- A replica registers, or comes back after it was given up, after the store was emptied, or after the store lost
-- writes: everything it carries is replaced by what it says.
-- KEYS: load, leases, ended, replicas, orphans, held, meta. ARGV: replica, channel, join number, what it knows as JSON:
-- era (0 when it met none), backends {name, tier, epoch}, parts {backend, birth, decodes, KV, prefill, residents,
-- sequence, published, slack}, leases {id, backend, birth, sequence, decodes, KV, prefill, tier, pace as text},
-- held (JSON in JSON).
-- Answers JSON: era, members {backend, epoch, tier, birth, sequence}, remade (backends it made known again).
local replica, channel = ARGV[1], ARGV[2]
local now = clock_ms()
local known = cjson.decode(ARGV[4])
local era = era_of(KEYS[7], now)
local emptied = known.era ~= era
local last_epoch = tonumber(redis.call('HGET', KEYS[7], 'epoch') or 0)
local remade = {}

local function answer()
  local members = {}
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    if string.sub(field, 1, 2) == 's|' then
      local backend = string.sub(field, 3)
      local blobs = redis.call('HMGET', KEYS[1], field, 'r|' .. replica .. '|' .. backend)
      local standing = read_packed(blobs[1])
      local sequence = blobs[2] and read_packed(blobs[2])[9] or 0
      members[#members + 1] = {backend, standing[1], standing[3], standing[2], sequence}
    end
  end
  local anew = {}
  for backend in pairs(remade) do
    anew[#anew + 1] = backend
  end
  return cjson.encode({era = era, members = members, remade = anew})
end

if redis.call('HGET', KEYS[2], '') == ARGV[3] then
  return answer()
end
local touched, touch = take_out(KEYS[1], KEYS[2], replica)
local members = {}
for _, one in ipairs(known.backends) do
  local backend, tier, epoch = one[1], one[2], one[3]
  if tier == cjson.null then
    tier = false
  end
  local found = touch(backend)
  -- An epoch that the store has not given yet: it lost the write that added the backend. Others were removed.
  if not found and (emptied or epoch > last_epoch) then
    local first = next_epoch(KEYS[7], now, epoch)
    touched[backend] = {standing = {first, first, tier, math.huge, 0, 0, 0, 0, {}}, paces = {}}
    remade[backend] = true
    members[#members + 1] = {backend, first, tier}
  elseif found and epoch > found.standing[1] then
    -- It saw a later membership than the store has: the store lost that write.
    found.standing[1], found.standing[3] = next_epoch(KEYS[7], now, epoch), tier
    members[#members + 1] = {backend, found.standing[1], tier}
  end
end
-- What stood on a backend that was removed and added again is over.
local function same_home(found, backend, birth)
  return found and (emptied or remade[backend] or found.standing[2] == birth)
end

local parts = {}
local function part_of(backend)
  parts[backend] = parts[backend] or new_part()
  return parts[backend]
end
for _, one in ipairs(known.parts) do
  if same_home(touch(one[1]), one[1], one[2]) then
    local part = part_of(one[1])
    part[1], part[2], part[3], part[13] = one[3], one[4], one[5], one[6]
    -- Joining is a write: what was measured before it is late.
    part[9], part[10], part[15] = one[7] + 1, one[8], one[9]
  end
end
for _, one in ipairs(known.leases) do
  local id, backend, birth, sequence, decodes, kv, prefill, tier = unpack(one)
  local pace = one[9] == 'inf' and math.huge or tonumber(one[9])
  local found = touch(backend)
  if same_home(found, backend, birth) and not redis.call('ZSCORE', KEYS[3], id) then
    local part = part_of(backend)
    part[8] = part[8] + 1
    if sequence > part[10] then
      part[4], part[5], part[6] = part[4] + decodes, part[5] + kv, part[6] + prefill
      bump(part[14], tier, decodes)
    else
      part[7] = part[7] + 1
    end
    count_pace(found.paces, found.standing, pace, 1)
    redis.call('HSET', KEYS[2], id,
      cmsgpack.pack(backend, found.standing[2], sequence, decodes, kv, prefill, tier, pace))
  end
end
local news = {}
for backend, part in pairs(parts) do
  part[11] = now
  count_part(touched[backend].standing, part, 1)
  redis.call('HSET', KEYS[1], 'r|' .. replica .. '|' .. backend, write_packed(part))
end
for backend, one in pairs(touched) do
  if one and (parts[backend] or one.had_part) then
    news[#news + 1] = told(backend, replica, one.standing, parts[backend] or new_part(), now)
  end
end
write_touched(KEYS[1], touched)
redis.call('HSET', KEYS[2], '', ARGV[3])
redis.call('ZADD', KEYS[4], now, replica)
redis.call('ZREM', KEYS[5], replica)
if known.held == '[]' then
  redis.call('HDEL', KEYS[6], replica)
else
  redis.call('HSET', KEYS[6], replica, cmsgpack.pack(now, known.held))
end
tell(KEYS[7], channel, now, {
  from = replica, joined = {replica}, parts = news, members = members, held = {{replica, known.held, 0}},
})
return answer()
