-- Mark a job as lost unless it is written; after that, submit.lua does not write it.
-- KEYS: job record, mark of a lost job.  ARGV: seconds that the mark is kept.
-- Returns 1 if the job is marked, 0 if it is written.
if redis.call('HEXISTS', KEYS[1], 'job') == 1 then
  return 0
end
redis.call('SET', KEYS[2], 1, 'EX', ARGV[1])
return 1
