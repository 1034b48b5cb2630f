-- Write one posting, or return why not. Everything is read and checked before the first write: Redis keeps
-- what a failed script has written. Amounts are decimal strings: Lua's numbers are exact only to 2^53.
--
-- KEYS: balances, entries, holds, journal, expiries
-- ARGV: transfer id, transfer, legs as JSON, name of the hold or "", the hold as read or "", the hold after,
--       the time at which it may expire or "", an entry that the caller was answered before: its transfer's id
--       or "", and its number; then for each leg: account, lamports, and the bound on the account's balance
--       before: "least" or "most", and an amount. The bound on the chain's account, which is below zero, is on
--       its absolute value.
-- Returns {"posted", number, time in ms} | {"known"} | {"changed"} | {"refused", index of the leg, balance}
--         | {"lost", length of the journal}: that entry is gone, and nothing was written

local balances, entries, holds, journal, expiries = unpack(KEYS)
local id, transfer, legs, hold_name, before, after, expires_at_ms, marked_id, marked_number = unpack(ARGV, 1, 9)
local FIRST_LEG, LEG_SIZE = 10, 4

local function less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end

local function is_within(account, balance, side, limit)
  local sign, held = balance:match('^(-?)(%d+)$')
  if not held then return false end
  if held ~= '0' and (sign == '-') ~= (account == 'chain') then return false end
  if side == 'least' then return not less(held, limit) end
  return not less(limit, held)
end

if marked_id ~= '' and redis.call('HGET', entries, marked_id) ~= marked_number then
  return {'lost', redis.call('XLEN', journal)}
end

if redis.call('HEXISTS', entries, id) == 1 then return {'known'} end

if hold_name ~= '' and (redis.call('HGET', holds, hold_name) or '') ~= before then return {'changed'} end

for leg = FIRST_LEG, #ARGV, LEG_SIZE do
  local account, _, side, limit = unpack(ARGV, leg, leg + LEG_SIZE - 1)
  local balance = redis.call('HGET', balances, account) or '0'
  if not is_within(account, balance, side, limit) then
    return {'refused', (leg - FIRST_LEG) / LEG_SIZE, balance}
  end
end

-- A key of another type fails here, while nothing is written.
redis.call('ZCARD', expiries)
local number = string.format('%.0f', redis.call('XLEN', journal) + 1)
local time = redis.call('TIME')
local at_ms = time[1] .. string.format('%03d', math.floor(tonumber(time[2]) / 1000))

-- The journal first: the one write that can still fail, if entries were added to it by hand.
redis.call('XADD', journal, number .. '-0', 'at_ms', at_ms, 'transfer', transfer, 'legs', legs)
redis.call('HSET', entries, id, number)
for leg = FIRST_LEG, #ARGV, LEG_SIZE do
  redis.call('HINCRBY', balances, ARGV[leg], ARGV[leg + 1])
end
if hold_name ~= '' then
  redis.call('HSET', holds, hold_name, after)
  if expires_at_ms ~= '' then
    redis.call('ZADD', expiries, expires_at_ms, hold_name)
  else
    redis.call('ZREM', expiries, hold_name)
  end
end
return {'posted', number, at_ms}
