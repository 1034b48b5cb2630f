-- Note a reader that comes back to a job; one that waits for its client goes on. Not to a job that was cancelled for
-- good, that failed, or whose time to come back is over.
-- KEYS: job record, its readers, cancelled jobs, jobs of the request, jobs of the address that wait for their clients.
-- ARGV: job id, the reader, "waits" for a job that waits alone or "first left" for one whose first reader is known to
-- have left, seconds that readers are kept, cancellations that are kept.
-- Returns 1 if the reader may read the job.
local job, readers, cancelled, asked, left_of = unpack(KEYS)
local id, reader, how, readers_s, kept = unpack(ARGV)
local time = redis.call('TIME')
local until_ms = tonumber(redis.call('HGET', asked, id) or '')
local state = redis.call('HGET', job, 'state')
if not state or redis.call('HEXISTS', job, 'cancelled') == 1 or state == 'failed'
    or (until_ms and until_ms < time[1] * 1000) then
  redis.call('HDEL', asked, id)
  return 0
end
if how == 'waits' and redis.call('HEXISTS', job, 'left') == 0 then
  return 0
end
if how ~= '' then
  redis.call('HSET', job, 'unread', 1)
end
redis.call('SADD', readers, reader)
redis.call('EXPIRE', readers, readers_s)
if redis.call('HDEL', job, 'left') == 1 then
  redis.call('HINCRBY', job, 'returns', 1)
  redis.call('ZREM', left_of, id)
  redis.call('XADD', cancelled, 'MAXLEN', kept, '*', 'job', id, 'back', 1)
end
return 1
