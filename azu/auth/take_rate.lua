-- Take one request from a bucket (the generic cell rate algorithm), or only look whether there is one.
-- KEYS: the bucket.  ARGV: microseconds in which one request is refilled, microseconds that a full bucket holds,
-- 1 to take the request.
-- Returns 0 if the request is there, else the microseconds until it could be; then nothing was changed.
-- Buckets are not written to disk: after a restart all are full.
redis.set_repl(redis.REPL_NONE)
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local interval, depth = tonumber(ARGV[1]), tonumber(ARGV[2])
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now) + interval
if full - now > depth then
  return full - now - depth
end
if ARGV[3] == '1' then
  redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
end
return 0
