-- Take one request from a bucket (the generic cell rate algorithm).
-- KEYS: the bucket.  ARGV: microseconds in which one request is refilled, microseconds that a full bucket holds.
-- Returns 0 if the request was taken, else the microseconds until it could be; then nothing was changed.
-- Buckets are not written to disk: after a restart all are full.
redis.set_repl(redis.REPL_NONE)
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local interval, depth = tonumber(ARGV[1]), tonumber(ARGV[2])
local full = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now) + interval
if full - now > depth then
  return full - now - depth
end
redis.call('SET', KEYS[1], string.format('%.0f', full), 'PX', math.ceil((full - now) / 1000))
return 0
