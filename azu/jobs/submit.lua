-- Write a job down and queue it, once; one that was given up for lost is not written down any more.
-- KEYS: job record, queue, the address's jobs, the mark of a lost job.  ARGV: job id, job JSON, created_at_ms.
-- Returns 1 if the job was written, 0 if it is known, -1 if it was given up.
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
