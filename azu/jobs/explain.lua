-- Record where jobs stand, for their owners; a job that has ended or is unknown does not change.
-- KEYS: the mark of the last call, which fails where Redis takes no writes; job records.  ARGV: a phase for each.
redis.call('SET', KEYS[1], 1, 'EX', 60)
for i = 2, #KEYS do
  if redis.call('HEXISTS', KEYS[i], 'job') == 1 and redis.call('HEXISTS', KEYS[i], 'outcome') == 0 then
    redis.call('HSET', KEYS[i], 'phase', ARGV[i - 1])
  end
end
return 1
