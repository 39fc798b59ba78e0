-- Replace what a replica carries by what it measured, and what it holds; see Store.publish and Part.publish.
-- KEYS: load, leases, replicas, held, meta. ARGV: replica, join number, channel, whether the held follow ('1') or are
-- as before (''), the held as JSON, packed numbers (five doubles each: sequence, decodes, KV tokens, prefill tokens,
-- age in ms), then backend, residents (JSON) and slack of each.
-- Answers {-1} to a replica that has to join; else for each 1 or 0 (taken or not), the sequence it met (-1: the
-- backend is not known) and the backend's birth.
local replica, channel = ARGV[1], ARGV[3]
if redis.call('HGET', KEYS[2], '') ~= ARGV[2] then
  return {-1}
end
local now = clock_ms()
redis.call('ZADD', KEYS[3], now, replica)
local answer, news = {}, {}
for i = 7, #ARGV, 3 do
  local backend = ARGV[i]
  local standing_field, part_field = 's|' .. backend, 'r|' .. replica .. '|' .. backend
  local blobs = redis.call('HMGET', KEYS[1], standing_field, part_field)
  local taken, met, birth = 0, -1, 0
  if blobs[1] then
    local sequence, decodes, kv, prefill, age = struct.unpack('<ddddd', ARGV[6], (i - 7) / 3 * 40 + 1)
    local part = blobs[2] and read_packed(blobs[2]) or new_part()
    local standing = read_packed(blobs[1])
    met, birth = part[9], standing[2]
    if sequence > met then
      taken = 1
      count_part(standing, part, -1)
      part = {
        decodes, kv, prefill, 0, 0, 0, part[8], part[8], sequence, sequence, now, age,
        cjson.decode(ARGV[i + 1]), {}, ARGV[i + 2],
      }
      count_part(standing, part, 1)
      redis.call('HSET', KEYS[1], standing_field, write_packed(standing), part_field, write_packed(part))
      news[#news + 1] = told(backend, replica, standing, part, now)
    end
  end
  answer[#answer + 1] = taken
  answer[#answer + 1] = met
  answer[#answer + 1] = birth
end
if ARGV[4] == '1' then
  if ARGV[5] == '[]' then
    redis.call('HDEL', KEYS[4], replica)
  else
    redis.call('HSET', KEYS[4], replica, cmsgpack.pack(now, ARGV[5]))
  end
end
if #news > 0 or ARGV[4] == '1' then
  tell(KEYS[5], channel, now, {
    from = replica, parts = news, held = ARGV[4] == '1' and {{replica, ARGV[5], 0}} or nil,
  })
end
return answer
