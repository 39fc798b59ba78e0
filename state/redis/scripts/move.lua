-- Compare and set a backend's tier; see Store.claim and Store.hand_back.
-- KEYS: load, meta. ARGV: replica, channel, backend, expected epoch, and the tier (none: back to the pool, only when
-- nobody carries anything).
-- Answers {1, epoch, tier} when moved, else {0, epoch, tier} as it stands; epoch 0 when it is not known.
local field = 's|' .. ARGV[3]
local blob = redis.call('HGET', KEYS[1], field)
if not blob then
  return {0, 0, false}
end
local standing = read_packed(blob)
local empty = standing[8] == 0 and standing[5] == 0 and standing[6] == 0 and standing[7] == 0
  and next(standing[9]) == nil
if standing[1] ~= tonumber(ARGV[4]) or not (ARGV[5] or empty) then
  return {0, standing[1], standing[3]}
end
local now = clock_ms()
standing[1] = next_epoch(KEYS[2], now, standing[1])
standing[3] = ARGV[5] or false
redis.call('HSET', KEYS[1], field, write_packed(standing))
tell(KEYS[2], ARGV[2], now, {from = ARGV[1], members = {{ARGV[3], standing[1], standing[3]}}})
return {1, standing[1], standing[3]}
