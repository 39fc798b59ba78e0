-- Make a backend known; see Store.add_backend.
-- KEYS: load, meta. ARGV: replica, channel, backend, and its tier (none: the pool).
-- Answers {epoch, tier, birth}.
local field = 's|' .. ARGV[3]
local blob = redis.call('HGET', KEYS[1], field)
local standing
if blob then
  standing = read_packed(blob)
else
  local now = clock_ms()
  local epoch = next_epoch(KEYS[2], now)
  standing = {epoch, epoch, ARGV[4] or false, math.huge, 0, 0, 0, 0, {}}
  redis.call('HSET', KEYS[1], field, write_packed(standing))
  tell(KEYS[2], ARGV[2], now, {from = ARGV[1], members = {{ARGV[3], epoch, standing[3]}}})
end
return {standing[1], standing[3], standing[2]}
