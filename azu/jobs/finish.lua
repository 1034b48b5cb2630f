-- Write a job's outcome and the last event of its stream, once.
-- The event's number is above that of every token that a reader may have, also where Redis lost the last ones.
-- KEYS: job record, token stream, ended jobs, prefix of what addresses earned (azu/jobs/earned.py).
-- ARGV: job id, state, outcome JSON, completion tokens, seconds that the stream is kept, days that earnings are
-- kept, model, then each address and what it earned.
-- Returns 1 if this outcome was written, 0 if there was one already, -1 if there is no such job.
local id, state, outcome, tokens, kept_s, kept_days, model = unpack(ARGV)
local delivered = redis.call('HGET', KEYS[1], 'delivered')
if not delivered then
  return -1
end
if redis.call('HSETNX', KEYS[1], 'outcome', outcome) == 0 then
  return 0
end
local now_ms = redis.call('TIME')[1] * 1000
redis.call('HSET', KEYS[1], 'state', state, 'ended_at_ms', now_ms)
redis.call('XADD', KEYS[2], math.max(delivered, tokens) .. '-1', 'outcome', outcome)
redis.call('EXPIRE', KEYS[2], kept_s)
redis.call('ZADD', KEYS[3], now_ms, id)
local hour = math.floor(now_ms / 3600000)
for place = 8, #ARGV, 2 do
  local earned = string.format('%s%s:%d', KEYS[4], ARGV[place], math.floor(hour / 24))
  redis.call('HINCRBY', earned, string.format('%d/%s', hour, model), ARGV[place + 1])
  redis.call('EXPIRE', earned, (kept_days + 1) * 86400)
end
return 1
