-- Say for how long a job waits for its client; one that has waited long enough is cancelled for good.
-- KEYS: job record.
-- Returns the milliseconds, 0 if the job is cancelled for good, -1 if its client is there.
if redis.call('HEXISTS', KEYS[1], 'cancelled') == 1 then
  return 0
end
local until_ms = redis.call('HGET', KEYS[1], 'left')
if not until_ms then
  return -1
end
local time = redis.call('TIME')
local wait_ms = until_ms - time[1] * 1000 - math.floor(time[2] / 1000)
if wait_ms > 0 then
  return wait_ms
end
redis.call('HSET', KEYS[1], 'cancelled', 'client left')
return 0
