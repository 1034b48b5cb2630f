-- Write the new tokens of many jobs. Tokens that exist already are left as they are, so that sending the same
-- step twice, or from a pipeline that was given up, changes nothing; a job that has ended takes no more.
-- KEYS: job record, token stream of each event.  ARGV: index, count, tokens, logprobs of each event.
-- Returns the positions (from 1) of events that leave a gap or name no job; nothing of those is written.
local refused = {}

local function without_first(numbers, count)
  if count == 0 then
    return numbers
  end
  local kept = {}
  for number in string.gmatch(numbers, '%S+') do
    if count > 0 then
      count = count - 1
    else
      kept[#kept + 1] = number
    end
  end
  return table.concat(kept, ' ')
end

for i = 1, #KEYS / 2 do
  local job, stream = KEYS[2 * i - 1], KEYS[2 * i]
  local index, count = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2])
  local tokens, logprobs = ARGV[4 * i - 1], ARGV[4 * i]
  local found = redis.call('HMGET', job, 'delivered', 'outcome')
  local delivered = tonumber(found[1] or '-1')
  local last = index + count
  if index > delivered then
    refused[#refused + 1] = i
  elseif not found[2] and last > delivered then
    local known = delivered - index
    redis.call('XADD', stream, last .. '-0', 'tokens', without_first(tokens, known),
      'logprobs', without_first(logprobs, known))
    redis.call('HSET', job, 'delivered', last)
  end
end
return refused
