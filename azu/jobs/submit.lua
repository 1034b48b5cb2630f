-- Write a job and queue it, once. A job that was marked as lost is not written.
-- The address's list keeps its latest jobs, and none that is older than the list's age.
-- KEYS: job record, queue, the address's jobs, mark of a lost job, jobs of the request.
-- ARGV: job id, job JSON, created_at_ms, the list's length, its age in ms, name of the request (empty for a job that no
-- connection waits for), the ingress, seconds that the request is known, the prompt's tools as JSON or nothing.
-- Returns 1 if the job was written, 0 if it is known, -1 if it is marked as lost.
if redis.call('HEXISTS', KEYS[1], 'job') == 1 then
  return 0
end
if redis.call('EXISTS', KEYS[4]) == 1 then
  return -1
end
local queue_id = redis.call('XADD', KEYS[2], '*', 'job', ARGV[1])
redis.call('HSET', KEYS[1], 'job', ARGV[2], 'state', 'queued', 'attempts', 0, 'delivered', 0, 'queue_id', queue_id)
if ARGV[9] ~= '' then
  redis.call('HSET', KEYS[1], 'tools', ARGV[9])
end
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[1], 'asked', ARGV[6])
  redis.call('HSET', KEYS[5], ARGV[1], ARGV[7])
  redis.call('EXPIRE', KEYS[5], ARGV[8])
end
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -ARGV[4] - 1)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', ARGV[3] - ARGV[5])
redis.call('PEXPIRE', KEYS[3], ARGV[5])
return 1
