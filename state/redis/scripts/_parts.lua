-- The arithmetic of state/parts.py on packed values.
--
-- A standing, field 's|backend', is how a backend stands:
--   1 epoch, 2 birth (its first epoch), 3 tier or false, 4 tightest pace in ms,
--   5 decodes, 6 KV tokens, 7 queued prefill tokens, 8 leases, 9 residents by tier; 5 to 9 are the sums of all parts.
-- A part, field 'r|replica|backend', is what one replica carries there:
--   1-3 measured and 4-6 reserved decodes, KV tokens, queued prefill tokens, 7 leases that the last publish saw,
--   8 leases, 9 sequence of the last write, 10 of the last publish, 11 when it was written (ms), 12 how old it was
--   then (ms), 13 measured and 14 reserved residents by tier, 15 slack as it was published (text, only passed on).
-- Paces, field 'p|backend': how many leases have a pace, by the pace in ms.
-- A lease, in the replica's own hash: 1 backend, 2 birth, 3 sequence of the write that granted it, 4 decodes,
--   5 KV tokens, 6 prefill tokens, 7 tier, 8 pace in ms.

local function new_part()
  return {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, ''}
end

local function read_packed(blob)
  return {cmsgpack.unpack(blob)}
end

local function write_packed(values)
  return cmsgpack.pack(unpack(values))
end

local function bump(residents, tier, by)
  local left = (residents[tier] or 0) + by
  if left > 0 then
    residents[tier] = left
  else
    residents[tier] = nil
  end
end

-- Add a part to a standing (sign 1) or take it out (sign -1).
local function count_part(standing, part, sign)
  standing[5] = standing[5] + sign * (part[1] + part[4])
  standing[6] = standing[6] + sign * (part[2] + part[5])
  standing[7] = standing[7] + sign * (part[3] + part[6])
  standing[8] = standing[8] + sign * part[8]
  for side = 13, 14 do
    for tier, count in pairs(part[side]) do
      bump(standing[9], tier, sign * count)
    end
  end
end

-- A part's residents, measured and reserved together.
local function residents_of(part)
  local residents = {}
  for side = 13, 14 do
    for tier, count in pairs(part[side]) do
      residents[tier] = (residents[tier] or 0) + count
    end
  end
  return residents
end

-- Count a pace up or down; the standing keeps the tightest. A request without a promise is never the tightest.
local function count_pace(paces, standing, pace, by)
  if pace == math.huge then
    return
  end
  local left = (paces[pace] or 0) + by
  if left > 0 then
    paces[pace] = left
    if pace < standing[4] then
      standing[4] = pace
    end
    return
  end
  paces[pace] = nil
  if pace <= standing[4] then
    local tightest = math.huge
    for other in pairs(paces) do
      if other < tightest then
        tightest = other
      end
    end
    standing[4] = tightest
  end
end

-- How a part is told: backend, replica, epoch, tier, decodes, KV, prefill, age in ms, residents, slack.
local function told(backend, replica, standing, part, now)
  local age = math.max(now - part[11], 0) + part[12]
  return {
    backend, replica, standing[1], standing[3],
    part[1] + part[4], part[2] + part[5], part[3] + part[6], age, residents_of(part), part[15],
  }
end
