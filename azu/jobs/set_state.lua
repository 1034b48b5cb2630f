-- Record a job's state unless it has ended; count how often it began to run.
-- KEYS: job record.  ARGV: state.
-- Returns 1 if the user has cancelled the job, 0 if not, -1 if there is no such job.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return -1
end
if redis.call('HEXISTS', KEYS[1], 'outcome') == 1 then
  return redis.call('HEXISTS', KEYS[1], 'cancelled')
end
redis.call('HSET', KEYS[1], 'state', ARGV[1])
if ARGV[1] == 'running' then
  redis.call('HINCRBY', KEYS[1], 'attempts', 1)
end
return redis.call('HEXISTS', KEYS[1], 'cancelled')
