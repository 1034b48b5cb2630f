-- Write the new tokens of many jobs. Tokens that are already written do not change: a step that is sent twice,
-- or by a pipeline that was replaced, changes nothing. An ended job takes no more tokens.
-- KEYS: job record, token stream of each event.
-- ARGV: index, count, tokens, logprobs, top, choice, finish, work of each event.
-- Returns the positions (from 1) of events that leave a gap or name an unknown job; these are not written.
local refused = {}

local function without_first(words, count)
  if count == 0 then
    return words
  end
  local kept = {}
  for word in string.gmatch(words, '%S+') do
    if count > 0 then
      count = count - 1
    else
      kept[#kept + 1] = word
    end
  end
  return table.concat(kept, ' ')
end

for i = 1, #KEYS / 2 do
  local job, stream = KEYS[2 * i - 1], KEYS[2 * i]
  local index, count, tokens, logprobs, top, choice, finish, work = unpack(ARGV, 8 * i - 7, 8 * i)
  index, count = tonumber(index), tonumber(count)
  local found = redis.call('HMGET', job, 'delivered', 'outcome')
  local delivered = tonumber(found[1] or '-1')
  local last = index + count
  if index > delivered then
    refused[#refused + 1] = i
  elseif not found[2] and last > delivered then
    local known = delivered - index
    redis.call('XADD', stream, last .. '-0', 'tokens', without_first(tokens, known),
      'logprobs', without_first(logprobs, known), 'top', without_first(top, known),
      'choice', choice, 'finish', finish, 'work', work)
    redis.call('HSET', job, 'delivered', last)
  end
end
return refused
