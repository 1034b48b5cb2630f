-- Write a job and queue it, once. A job that was marked as lost is not written.
-- KEYS: job record, queue, the address's jobs, mark of a lost job.  ARGV: job id, job JSON, created_at_ms.
-- Returns 1 if the job was written, 0 if it is known, -1 if it is marked as lost.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
if redis.call('EXISTS', KEYS[4]) == 1 then
  return -1
end
local queue_id = redis.call('XADD', KEYS[2], '*', 'job', ARGV[1])
redis.call('HSET', KEYS[1], 'job', ARGV[2], 'state', 'queued', 'attempts', 0, 'delivered', 0, 'queue_id', queue_id)
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[1])
return 1
