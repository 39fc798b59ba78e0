-- Forget a backend and what everybody carries there; see Store.remove_backend.
-- KEYS: load, meta. ARGV: replica, channel, backend.
local gone = redis.call('HDEL', KEYS[1], 's|' .. ARGV[3], 'p|' .. ARGV[3])
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  local _, backend = string.match(field, '^r|([^|]*)|(.*)$')
  if backend == ARGV[3] then
    redis.call('HDEL', KEYS[1], field)
  end
end
if gone > 0 then
  tell(KEYS[2], ARGV[2], clock_ms(), {from = ARGV[1], removed = {ARGV[3]}})
end
return gone
