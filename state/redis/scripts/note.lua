-- The engine's own count bounds what dead replicas can still have there; see Store.note_engine.
-- KEYS: load, orphans, meta. ARGV: replica, channel, backend, sequences that the engine has.
-- How many of them are the dead ones' is not known, so all of them may be: only what exceeds the count ends.
local standing_field = 's|' .. ARGV[3]
local blob = redis.call('HGET', KEYS[1], standing_field)
if not blob then
  return 0
end
local now = clock_ms()
local standing = read_packed(blob)
local left = tonumber(ARGV[4])
local news = {}
for _, orphan in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local part_field = 'r|' .. orphan .. '|' .. ARGV[3]
  local packed = redis.call('HGET', KEYS[1], part_field)
  if packed then
    local part = read_packed(packed)
    local had = part[1] + part[4]
    local keep = math.min(had, left)
    left = left - keep
    local carries = part[8] > 0 or part[2] + part[5] + part[3] + part[6] > 0
    if keep < had or (had == 0 and carries and tonumber(ARGV[4]) == 0) then
      local share = had > 0 and keep / had or 0
      local residents = {}
      local to_name = keep
      for tier, number in pairs(residents_of(part)) do
        bump(residents, tier, math.min(number, to_name))
        to_name = to_name - math.min(number, to_name)
      end
      count_part(standing, part, -1)
      part = {
        keep, math.ceil((part[2] + part[5]) * share), math.ceil((part[3] + part[6]) * share), 0, 0, 0,
        keep > 0 and part[8] or 0, keep > 0 and part[8] or 0, part[9] + 1, part[9] + 1, now, 0, residents, {},
        keep > 0 and part[15] or '',
      }
      count_part(standing, part, 1)
      redis.call('HSET', KEYS[1], part_field, write_packed(part))
      news[#news + 1] = told(ARGV[3], orphan, standing, part, now)
    end
  end
end
if #news > 0 then
  redis.call('HSET', KEYS[1], standing_field, write_packed(standing))
  tell(KEYS[3], ARGV[2], now, {from = ARGV[1], parts = news})
end
return #news
