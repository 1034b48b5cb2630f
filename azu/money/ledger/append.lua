-- Write the next entries of the journal, if its last entry is the one that their writer built on. Everything
-- is checked before the first write. The entries are hash-chained: what a failed script leaves behind is a
-- whole beginning of them.
--
-- KEYS: journal
-- ARGV: number and hash of the last entry as the writer knows it, "0" and "" for an empty journal; then for
--       each entry: number, text, hash
-- Returns number and hash of the last entry as it is afterwards.

local journal, number, hash = KEYS[1], ARGV[1], ARGV[2]

local found_number, found_hash = '0', ''
local last = redis.call('XREVRANGE', journal, '+', '-', 'COUNT', 1)[1]
if last then
  found_number = last[1]:match('^(%d+)-0$') or last[1]
  for field = 1, #last[2], 2 do
    if last[2][field] == 'hash' then found_hash = last[2][field + 1] end
  end
end
if found_number ~= number or found_hash ~= hash then return {found_number, found_hash} end

for at = 3, #ARGV, 3 do
  redis.call('XADD', journal, ARGV[at] .. '-0', 'entry', ARGV[at + 1], 'hash', ARGV[at + 2])
end
return {ARGV[#ARGV - 2], ARGV[#ARGV]}
