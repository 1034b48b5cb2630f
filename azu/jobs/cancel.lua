-- Mark a job that has not ended as cancelled, and write its id, once, to the stream that schedulers read.
-- KEYS: job record, cancelled jobs.  ARGV: job id, who cancels it first, number of cancellations that are kept.
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('HEXISTS', KEYS[1], 'outcome') == 1 then
  return 0
end
if redis.call('HSETNX', KEYS[1], 'cancelled', ARGV[2]) == 1 then
  redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[3], '*', 'job', ARGV[1])
end
return 1
