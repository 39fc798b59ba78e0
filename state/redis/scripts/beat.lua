-- A sign of life; says who has been silent for too long.
-- KEYS: replicas, leases, orphans, ended, meta, load. ARGV: replica, join number, lease time (ms), how long endings
-- are remembered (ms), how many at most, packed sequences this replica has seen (a double each), then their backends.
-- Answers {-1} to a replica that has to join; {-2} to one whose writes were lost; else {era, replicas, orphans, names
-- to bury}.
local replica, lease_ms, remember_ms = ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('HGET', KEYS[2], '') ~= ARGV[2] then
  return {-1}
end
for i = 7, #ARGV do
  local blobs = redis.call('HMGET', KEYS[6], 's|' .. ARGV[i], 'r|' .. replica .. '|' .. ARGV[i])
  local seen = struct.unpack('<d', ARGV[6], 8 * (i - 7) + 1)
  if blobs[1] and seen > 0 and (not blobs[2] or read_packed(blobs[2])[9] < seen) then
    return {-2}
  end
end
local now = clock_ms()
local last = tonumber(redis.call('HGET', KEYS[5], 'beaten') or now)
if now - last > lease_ms or last > now + lease_ms then
  -- Nobody was heard for a lease time: the store was away, or its clock jumped. The replicas' silence says nothing.
  for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    redis.call('ZADD', KEYS[1], now, name)
  end
end
redis.call('HSET', KEYS[5], 'beaten', string.format('%.0f', now))
redis.call('ZADD', KEYS[1], now, replica)
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now - remember_ms)
redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -tonumber(ARGV[5]) - 1)
redis.call('PEXPIRE', KEYS[4], remember_ms + 10 * lease_ms)
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. string.format('%.0f', now - lease_ms))
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', '(' .. string.format('%.0f', now - 2 * lease_ms))) do
  names[#names + 1] = name
end
return {era_of(KEYS[5], now), redis.call('ZCARD', KEYS[1]), redis.call('ZCARD', KEYS[3]), names}
