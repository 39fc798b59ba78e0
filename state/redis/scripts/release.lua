-- End a lease; see Store.release and Part.end.
-- KEYS: load, leases, ended. ARGV: replica, lease, how long an ending is remembered when nobody beats (ms).
-- Answers {backend, sequence} when its load was taken away, else {}.
local replica, lease = ARGV[1], ARGV[2]
local now = clock_ms()
redis.call('ZADD', KEYS[3], now, lease)
local found = redis.call('HMGET', KEYS[2], '', lease)
if not found[1] then
  redis.call('PEXPIRE', KEYS[3], ARGV[3])
end
if not found[2] then
  return {}
end
redis.call('HDEL', KEYS[2], lease)
local backend, birth, granted_at, decodes, kv, prefill, tier, pace = cmsgpack.unpack(found[2])
local standing_field, part_field, pace_field = 's|' .. backend, 'r|' .. replica .. '|' .. backend, 'p|' .. backend
local blobs = redis.call('HMGET', KEYS[1], standing_field, part_field, pace_field)
if not blobs[1] then
  return {}
end
local standing = read_packed(blobs[1])
if standing[2] ~= birth then
  return {}
end
local paces = blobs[3] and cmsgpack.unpack(blobs[3]) or {}
count_pace(paces, standing, pace, -1)
local part = blobs[2] and read_packed(blobs[2]) or new_part()
count_part(standing, part, -1)
part[9] = part[9] + 1
-- An orphan's part that the engine's own count has emptied has no leases left to count down.
part[8] = math.max(part[8] - 1, 0)
local side = 0
if granted_at > part[10] then
  side = 3
  part[6] = math.max(part[6] - prefill, 0)
else
  part[7] = math.max(part[7] - 1, 0)
end
if side == 0 and part[7] == 0 then
  part[1], part[2], part[3], part[13], part[15] = 0, 0, 0, {}, ''
else
  part[side + 1] = math.max(part[side + 1] - decodes, 0)
  part[side + 2] = math.max(part[side + 2] - kv, 0)
  bump(part[side == 0 and 13 or 14], tier, -decodes)
end
part[11], part[12] = now, 0
count_part(standing, part, 1)
redis.call('HSET', KEYS[1], standing_field, write_packed(standing), part_field, write_packed(part))
if next(paces) then
  redis.call('HSET', KEYS[1], pace_field, cmsgpack.pack(paces))
elseif blobs[3] then
  redis.call('HDEL', KEYS[1], pace_field)
end
return {backend, part[9]}
