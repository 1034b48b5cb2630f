-- Write a job's outcome and the last event of its stream, once.
-- The event's number is above that of every token that a reader may have, also where Redis lost the last ones.
-- KEYS: job record, token stream.  ARGV: state, outcome JSON, seconds that the stream is kept, completion tokens.
-- Returns 1 if this outcome was written, 0 if there was one already, -1 if there is no such job.
local delivered = redis.call('HGET', KEYS[1], 'delivered')
if not delivered then
  return -1
end
if redis.call('HSETNX', KEYS[1], 'outcome', ARGV[2]) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], 'state', ARGV[1])
redis.call('XADD', KEYS[2], math.max(delivered, ARGV[4]) .. '-1', 'outcome', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
