-- Note that the whole answer of an ended job was read; no connection waits for the job.
-- KEYS: job record.
if redis.call('HEXISTS', KEYS[1], 'outcome') == 1 then
  redis.call('HSET', KEYS[1], 'read', 1)
end
return 1
