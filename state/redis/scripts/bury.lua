-- A replica that is silent for a lease time becomes an orphan, and after two its load is taken out; one that leaves
-- is taken out at once.
-- KEYS: load, leases and ended of that replica, replicas, orphans, held, meta. ARGV: who asks, channel, replica, lease time (ms),
-- '1' when it leaves.
-- Answers 0 when nothing was due, 1 when it became an orphan, 2 when it was taken out.
local name, lease_ms, leaves = ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
local now = clock_ms()
local news = {from = ARGV[1]}
local beaten = tonumber(redis.call('ZSCORE', KEYS[4], name) or nil)
if beaten and (leaves or now - beaten > lease_ms) then
  redis.call('ZREM', KEYS[4], name)
  redis.call('ZADD', KEYS[5], beaten, name)
  -- Without the join number its next call tells it to join anew.
  redis.call('HDEL', KEYS[2], '')
  if redis.call('HDEL', KEYS[6], name) > 0 then
    news.held = {{name, '[]', 0}}
  end
  if not leaves and now - beaten <= 2 * lease_ms then
    news.orphaned = {name}
    tell(KEYS[7], ARGV[2], now, news)
    return 1
  end
end
beaten = tonumber(redis.call('ZSCORE', KEYS[5], name) or nil)
if not leaves and (not beaten or now - beaten <= 2 * lease_ms) then
  return 0
end
redis.call('ZREM', KEYS[5], name)
redis.call('DEL', KEYS[3])
local touched = take_out(KEYS[1], KEYS[2], name)
write_touched(KEYS[1], touched)
news.gone, news.parts = {name}, {}
for backend, one in pairs(touched) do
  if one and one.had_part then
    news.parts[#news.parts + 1] = told(backend, name, one.standing, new_part(), now)
  end
end
tell(KEYS[7], ARGV[2], now, news)
return 2
