-- Take the first candidate that fits; see Store.reserve.
-- KEYS: load, leases, ended. ARGV: replica, join number, lease, packed numbers (nine doubles a candidate: decodes,
-- KV tokens, prefill tokens, pace, the three limits, assumed tightest resident, epoch), then backend and tier of each.
-- Answers {-1} to a replica that has to join; {1, index, sequence, birth} when granted by this call; {2, backend,
-- sequence, birth, decodes, KV, prefill, tier, pace} when granted before; else {0, {index, epoch, tier, decodes, KV,
-- prefill, {tier, count, ...}}, ...} with what the other replicas carry.
-- Flat, because it is the one script that runs for every request.
local replica, lease = ARGV[1], ARGV[3]
local found = redis.call('HMGET', KEYS[2], '', lease)
if found[1] ~= ARGV[2] then
  return {-1}
end
if found[2] then
  local backend, birth, sequence, decodes, kv, prefill, tier, pace = cmsgpack.unpack(found[2])
  return {2, backend, sequence, birth, decodes, kv, prefill, tier, string.format('%.17g', pace)}
end
local count = (#ARGV - 4) / 2
if count == 0 then
  return {0}
end
local fields = {}
for i = 1, count do
  fields[i] = 's|' .. ARGV[2 * i + 3]
end
local standings = redis.call('HMGET', KEYS[1], unpack(fields))
if not redis.call('ZSCORE', KEYS[3], lease) then
  local numbers = ARGV[4]
  for i = 1, count do
    if standings[i] then
      local decodes, kv, prefill, pace, most_decodes, most_kv, most_prefill, assumed, asked_epoch =
        struct.unpack('<ddddddddd', numbers, 72 * i - 71)
      -- Without the residents, which only a grant and a denial need.
      local rest, epoch, birth, home, tightest, all_decodes, all_kv, all_prefill, leases =
        cmsgpack.unpack_limit(standings[i], 8, 0)
      if epoch == asked_epoch and tightest >= assumed and all_decodes + decodes <= most_decodes
        and all_kv + kv <= most_kv and all_prefill + prefill <= most_prefill
      then
        local backend, tier = ARGV[2 * i + 3], ARGV[2 * i + 4]
        local part_field, pace_field = 'r|' .. replica .. '|' .. backend, 'p|' .. backend
        local blobs = redis.call('HMGET', KEYS[1], part_field, pace_field)
        local time = redis.call('TIME')
        local _, residents = cmsgpack.unpack_one(standings[i], rest)
        local part = blobs[1] and {cmsgpack.unpack(blobs[1])} or {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, ''}
        part[4] = part[4] + decodes
        part[5] = part[5] + kv
        part[6] = part[6] + prefill
        part[8] = part[8] + 1
        part[9] = part[9] + 1
        part[11] = time[1] * 1000 + math.floor(time[2] / 1000)
        part[12] = 0
        if decodes > 0 then
          part[14][tier] = (part[14][tier] or 0) + decodes
          residents[tier] = (residents[tier] or 0) + decodes
        end
        if pace < tightest then
          tightest = pace
        end
        local standing = cmsgpack.pack(epoch, birth, home, tightest, all_decodes + decodes, all_kv + kv,
          all_prefill + prefill, leases + 1, residents)
        if pace == math.huge then
          redis.call('HSET', KEYS[1], fields[i], standing, part_field, cmsgpack.pack(unpack(part)))
        else
          local paces = blobs[2] and cmsgpack.unpack(blobs[2]) or {}
          paces[pace] = (paces[pace] or 0) + 1
          redis.call('HSET', KEYS[1], fields[i], standing, part_field, cmsgpack.pack(unpack(part)), pace_field,
            cmsgpack.pack(paces))
        end
        redis.call('HSET', KEYS[2], lease, cmsgpack.pack(backend, birth, part[9], decodes, kv, prefill, tier, pace))
        return {1, i - 1, part[9], birth}
      end
    end
  end
end
local answer = {0}
for i = 1, count do
  fields[i] = 'r|' .. replica .. '|' .. ARGV[2 * i + 3]
end
local parts = redis.call('HMGET', KEYS[1], unpack(fields))
for i = 1, count do
  if standings[i] then
    local epoch, _, home, _, decodes, kv, prefill, _, residents = cmsgpack.unpack(standings[i])
    if parts[i] then
      local part = {cmsgpack.unpack(parts[i])}
      decodes = decodes - part[1] - part[4]
      kv = kv - part[2] - part[5]
      prefill = prefill - part[3] - part[6]
      for side = 13, 14 do
        for tier, own in pairs(part[side]) do
          residents[tier] = residents[tier] - own
        end
      end
    end
    local others = {}
    for tier, left in pairs(residents) do
      if left > 0 then
        others[#others + 1] = tier
        others[#others + 1] = left
      end
    end
    answer[#answer + 1] = {i - 1, epoch, home, decodes, kv, prefill, others}
  end
end
return answer
