-- Note that a reader of a job left. When none is left, the job is cancelled for a while and keeps its reservation;
-- one that came back too often is cancelled for good. A job that has ended waits only for its request to come again.
-- KEYS: job record, its readers, cancelled jobs, jobs of the request, jobs that were left of the address.
-- ARGV: job id, the reader (empty: the first one), ms that the job waits, most returns, cancellations that are kept.
local job, readers, cancelled, asked, left_of = unpack(KEYS)
local id, reader, kept_ms, most, kept = unpack(ARGV)
if redis.call('EXISTS', job) == 0 then
  return 0
end
if reader == '' then
  redis.call('HSET', job, 'unread', 1)
else
  redis.call('SREM', readers, reader)
end
if redis.call('HEXISTS', job, 'unread') == 0 or redis.call('SCARD', readers) > 0
    or redis.call('HEXISTS', job, 'cancelled') == 1 then
  return 0
end
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local has_ended = redis.call('HEXISTS', job, 'outcome') == 1
if kept_ms + 0 == 0 or tonumber(redis.call('HGET', job, 'returns') or 0) >= most + 0 then
  redis.call('HDEL', asked, id)
  if not has_ended and redis.call('HSETNX', job, 'cancelled', 'client left') == 1 then
    redis.call('XADD', cancelled, 'MAXLEN', kept, '*', 'job', id)
  end
  return 0
end
redis.call('HSET', asked, id, now_ms + kept_ms)
redis.call('PEXPIRE', asked, kept_ms)
if not has_ended and redis.call('HSETNX', job, 'left', now_ms + kept_ms) == 1 then
  redis.call('ZREMRANGEBYSCORE', left_of, '-inf', now_ms)
  redis.call('ZADD', left_of, now_ms + kept_ms, id)
  redis.call('PEXPIRE', left_of, kept_ms)
  redis.call('XADD', cancelled, 'MAXLEN', kept, '*', 'job', id)
end
return 1
