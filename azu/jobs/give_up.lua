-- Give up a job for lost, unless it was written down: from now on it will not be.
-- KEYS: job record, the mark of a lost job.  ARGV: seconds that the mark is kept.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('SET', KEYS[2], 1, 'EX', ARGV[1])
return 1
