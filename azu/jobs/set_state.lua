-- Record a job's state unless it has ended; count how often it began to run.
-- KEYS: job record.  ARGV: state.
-- Returns 1 if the job is cancelled, for good or while its client may come back, 0 if not, -1 if there is no such job.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return -1
end
local is_cancelled = math.max(redis.call('HEXISTS', KEYS[1], 'cancelled'), redis.call('HEXISTS', KEYS[1], 'left'))
if redis.call('HEXISTS', KEYS[1], 'outcome') == 1 then
  return is_cancelled
end
redis.call('HSET', KEYS[1], 'state', ARGV[1])
if ARGV[1] == 'running' then
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
end
return is_cancelled
