-- Everything the store keeps of a fleet, field by field as JSON, for an audit. Writes nothing.
-- KEYS: load, replicas, orphans, held, meta, then the leases and the ended leases of each replica in ARGV.
-- Numbers that JSON cannot carry, or not exactly, travel as text.
local function text(number)
  return string.format('%.17g', number)
end

local now = clock_ms()
local standings, parts, paces, leases, unreadable = {}, {}, {}, {}, {}

-- What does not look as this version writes it is told by its name.
local function read(name, blob, take)
  local fine, values = pcall(read_packed, blob)
  if not (fine and pcall(take, values)) then
    unreadable[#unreadable + 1] = name
  end
end

local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local field, blob = all[i], all[i + 1]
  local kind, rest = string.sub(field, 1, 2), string.sub(field, 3)
  if kind == 's|' then
    read(field, blob, function(one)
      standings[#standings + 1] = {
        rest, text(one[1]), text(one[2]), one[3], text(one[4]), one[5] + 0, one[6] + 0, one[7] + 0, one[8] + 0, one[9],
      }
    end)
  elseif kind == 'p|' then
    read(field, blob, function(one)
      local counted = {}
      for pace, count in pairs(one[1]) do
        counted[#counted + 1] = {text(pace), count + 0}
      end
      paces[#paces + 1] = {rest, counted}
    end)
  elseif kind == 'r|' then
    local replica, backend = string.match(rest, '^([^|]*)|(.*)$')
    read(field, blob, function(one)
      parts[#parts + 1] = {
        replica, backend, one[1] + one[4], one[2] + one[5], one[3] + one[6], one[8] + 0, one[7] + 0,
        residents_of(one), math.max(now - one[11], 0) + one[12],
      }
    end)
  else
    unreadable[#unreadable + 1] = field
  end
end

for i = 1, #ARGV do
  local leases_key, ended_key = KEYS[4 + 2 * i], KEYS[5 + 2 * i]
  local stored = redis.call('HGETALL', leases_key)
  for j = 1, #stored, 2 do
    local id, blob = stored[j], stored[j + 1]
    if id ~= '' then
      read(leases_key .. ' ' .. id, blob, function(one)
        local ended = redis.call('ZSCORE', ended_key, id) and true or false
        leases[#leases + 1] = {ARGV[i], id, one[1], text(one[2]), one[4] + 0, one[7], text(one[8]), ended}
      end)
    end
  end
end

local function silence(key)
  local found = {}
  local scored = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #scored, 2 do
    found[#found + 1] = {scored[i], now - scored[i + 1]}
  end
  return found
end

local meta = redis.call('HMGET', KEYS[5], 'born', 'epoch', 'beaten')
return cjson.encode({
  now = text(now),
  born = meta[1],
  epoch = meta[2],
  beaten = meta[3],
  standings = standings,
  parts = parts,
  paces = paces,
  leases = leases,
  replicas = silence(KEYS[2]),
  orphans = silence(KEYS[3]),
  held = redis.call('HKEYS', KEYS[4]),
  unreadable = unreadable,
})
