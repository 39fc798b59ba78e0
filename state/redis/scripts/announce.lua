-- Tell the others what this replica carries on some backends.
-- KEYS: load, meta. ARGV: replica, channel, backends.
local now = clock_ms()
local news = {}
for i = 3, #ARGV do
  local backend = ARGV[i]
  local blobs = redis.call('HMGET', KEYS[1], 's|' .. backend, 'r|' .. ARGV[1] .. '|' .. backend)
  if blobs[1] then
    local part = blobs[2] and read_packed(blobs[2]) or new_part()
    news[#news + 1] = told(backend, ARGV[1], read_packed(blobs[1]), part, now)
  end
end
if #news > 0 then
  tell(KEYS[2], ARGV[2], now, {from = ARGV[1], parts = news})
end
return #news
