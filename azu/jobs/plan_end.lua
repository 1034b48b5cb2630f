-- Fix a job's outcome, once, before its money is settled.
-- KEYS: job record.  ARGV: outcome JSON.
-- Returns the outcome that was fixed first, or false if there is no such job.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return false
end
redis.call('HSETNX', KEYS[1], 'ending', ARGV[1])
return redis.call('HGET', KEYS[1], 'ending')
