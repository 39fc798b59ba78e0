-- Take out everything a replica carries: its parts, its leases, its paces. Returns the backends where it had a part
-- and their standings, which the caller may change further before it writes them with `write_touched`.
local function take_out(load_key, leases_key, replica)
  local touched = {}
  local prefix = 'r|' .. replica .. '|'
  local function touch(backend)
    local one = touched[backend]
    if one == nil then
      local blobs = redis.call('HMGET', load_key, 's|' .. backend, 'p|' .. backend)
      one = false
      if blobs[1] then
        one = {standing = read_packed(blobs[1]), paces = blobs[2] and cmsgpack.unpack(blobs[2]) or {}}
      end
      touched[backend] = one
    end
    return one
  end
  for _, field in ipairs(redis.call('HKEYS', load_key)) do
    if string.sub(field, 1, #prefix) == prefix then
      local one = touch(string.sub(field, #prefix + 1))
      if one then
        count_part(one.standing, read_packed(redis.call('HGET', load_key, field)), -1)
        one.had_part = true
      end
      redis.call('HDEL', load_key, field)
    end
  end
  local leases = redis.call('HGETALL', leases_key)
  for i = 1, #leases, 2 do
    if leases[i] ~= '' then
      local backend, birth, _, _, _, _, _, pace = cmsgpack.unpack(leases[i + 1])
      local one = touch(backend)
      if one and one.standing[2] == birth then
        count_pace(one.paces, one.standing, pace, -1)
      end
    end
  end
  redis.call('DEL', leases_key)
  return touched, touch
end

local function write_touched(load_key, touched)
  for backend, one in pairs(touched) do
    if one then
      redis.call('HSET', load_key, 's|' .. backend, write_packed(one.standing))
      if next(one.paces) then
        redis.call('HSET', load_key, 'p|' .. backend, cmsgpack.pack(one.paces))
      else
        redis.call('HDEL', load_key, 'p|' .. backend)
      end
    end
  end
end
