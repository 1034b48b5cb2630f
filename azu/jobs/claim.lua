-- Return the ids of jobs that are taken and not done, and assign them to this consumer.
-- Its own jobs are returned much sooner than those of others: one of them may have come in an answer that was lost.
-- KEYS: queue.  ARGV: group, consumer, idle_ms of others' jobs, idle_ms of its own, most.
local queue, group, consumer, idle_ms, own_ms, most = KEYS[1], unpack(ARGV)
local claimed = {}

-- The group, unless it exists: Redis may have lost it.
redis.pcall('XGROUP', 'CREATE', queue, group, '0', 'MKSTREAM')

local function keep(entries)
  for _, entry in ipairs(entries) do
    -- Redis 6.2 answers nil for an entry that was deleted.
    if entry and entry[2] then
      claimed[#claimed + 1] = entry[2][2]
    end
  end
end

local own = redis.call('XPENDING', queue, group, 'IDLE', own_ms, '-', '+', most, consumer)
if #own > 0 then
  local ids = {}
  for i, pending in ipairs(own) do
    ids[i] = pending[1]
  end
  keep(redis.call('XCLAIM', queue, group, consumer, own_ms, unpack(ids)))
end
-- One call examines a limited number of entries; running jobs at the front must not hide an idle one.
local cursor = '0-0'
repeat
  local answer = redis.call('XAUTOCLAIM', queue, group, consumer, idle_ms, cursor, 'COUNT', most)
  cursor = answer[1]
  keep(answer[2])
until cursor == '0-0' or #claimed >= tonumber(most)
return claimed
