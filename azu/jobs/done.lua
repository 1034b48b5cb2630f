-- Take a job out of the queue.
-- KEYS: job record, queue.  ARGV: group.
local queue_id = redis.call('HGET', KEYS[1], 'queue_id')
if not queue_id then
  return 0
end
redis.call('XACK', KEYS[2], ARGV[1], queue_id)
return redis.call('XDEL', KEYS[2], queue_id)
