"""What the queue does inside Redis, a Lua script each: between two commands of a worker, another one could step in.

No key name is built here: every key comes in KEYS, all of one pool and so of one slot. Members of `waiting` and `delayed` are
"OWNER JOB MODEL"; ids have a fixed width, so that fields are cut out by position and an owner's jobs lie in the order of their ids.
"""

GROUP = "dispatch"
PASSED = "passed"
"""Consumer under which entries are parked that a worker looked past, or gave back: delivered to nobody yet."""
LOOK_AHEAD = 8
"""Undelivered entries of a level among which a worker may choose one whose model it has in memory."""
PASSES_MAX = 4
"""An entry passed over so often goes first, whatever its model."""
PROMOTE_MAX = 64
"""Delayed jobs of a level that one look makes waiting ones."""
ENDANGERED = 0.7
"""Part of a lease after which a silent worker is waited for to the millisecond: it is found every tenth of a lease anyway."""
CLAIM_PAGE = 64
CLAIM_PAGES = 16
"""Silent entries of a level that one look goes through, a page at a time: parked ones must not hide a dead worker's."""

# KEYS: running, then stream, waiting, ready and delayed of FREE (level 1) and of PRO (level 2). ARGV[1..2]: limits of the levels.
_LEVELS = f"""
local GROUP, PASSED = '{GROUP}', '{PASSED}'
local call, sub = redis.call, string.sub
local RUNNING = KEYS[1]
local LEVELS = {{}}
for n = 1, 2 do
  local at = n * 4
  LEVELS[n] = {{number = n, stream = KEYS[at - 2], waiting = KEYS[at - 1], ready = KEYS[at], delayed = KEYS[at + 1]}}
  LEVELS[n].limit = tonumber(ARGV[n])
end

local function now_ms()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function append(level, owner, member)
  local job = sub(member, 38, 73)
  local id = call('XADD', level.stream, '*', 'job', job, 'owner', owner, 'model', sub(member, 75))
  call('HSET', level.ready, owner, job .. ' ' .. id)
end

-- For an owner without an undelivered entry: moves their first waiting job into the stream, if their limit lets it.
-- `newcomer` is a job of theirs that waits too, but was not written down yet: mostly it need not be.
local function admit(level, owner, newcomer)
  if level.limit > 0 and tonumber(call('HGET', RUNNING, owner) or 0) >= level.limit then
    if newcomer then call('ZADD', level.waiting, 0, newcomer) end
    return
  end
  local first = call('ZRANGEBYLEX', level.waiting, '[' .. owner .. ' ', '(' .. owner .. '!', 'LIMIT', 0, 1)[1]
  if newcomer and (not first or newcomer < first) then
    append(level, owner, newcomer)
  elseif first then
    call('ZREM', level.waiting, first)
    append(level, owner, first)
    if newcomer and newcomer ~= first then call('ZADD', level.waiting, 0, newcomer) end
  end
end

local function add_running(owner, change)
  local running = call('HINCRBY', RUNNING, owner, change)
  if running <= 0 then call('HDEL', RUNNING, owner) end
  return running
end

-- Whether the worker has the entry; also false when Redis was emptied, and the group with it.
local function holds(level, worker, id)
  local pending = redis.pcall('XPENDING', level.stream, GROUP, id, id, 1, worker)
  if not pending.err then return pending[1] ~= nil end
  if string.find(pending.err, 'NOGROUP', 1, true) then return false end
  error(pending.err)
end
"""

# ARGV[3..]: a job each: level (one digit), due time in milliseconds (13 digits, zeros: now), space, member.
PUT = (
    _LEVELS
    + """
for n = 3, #ARGV do
  local arg = ARGV[n]
  local level, due_ms = LEVELS[tonumber(sub(arg, 1, 1))], tonumber(sub(arg, 2, 14))
  local owner, job, member = sub(arg, 16, 51), sub(arg, 53, 88), sub(arg, 16)
  local ready = call('HGET', level.ready, owner)
  if ready and sub(ready, 1, 36) == job then  -- it is in the stream already
  elseif due_ms > 0 and due_ms > now_ms() then
    call('ZREM', level.waiting, member)
    call('ZADD', level.delayed, due_ms, member)
  else
    call('ZREM', level.delayed, member)
    if ready then call('ZADD', level.waiting, 0, member) else admit(level, owner, member) end
  end
end
"""
)

# ARGV[3..]: worker, lease in milliseconds, count, place in the weighted order of levels, models in the worker's memory.
# Returns level, taken over or not, entry id, job, owner of each entry in one list; if none: the ends of both streams, milliseconds
# until the next delayed job is due or the next lease may be over (-1: there is none).
TAKE = (
    _LEVELS
    + f"""
local worker, lease_ms, count, place = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local warm, choosy = {{}}, #ARGV > 6
for n = 7, #ARGV do warm[ARGV[n]] = true end
local entries, taken = {{}}, 0

local function hand_over(level, entry, taken_over)
  local at = #entries
  entries[at + 1], entries[at + 2], entries[at + 3], entries[at + 4], entries[at + 5] =
    level.number, taken_over, entry[1], entry[2][2], entry[2][4]
  taken = taken + 1
end

-- An entry without an owner is of a version that had none: PostgreSQL knows the job, and it is put in again.
local function drop(level, entry)
  call('XACK', level.stream, GROUP, entry[1])
  call('XDEL', level.stream, entry[1])
end

local function deliver(level, entry)
  local owner = entry[2][4]
  if not owner then return drop(level, entry) end
  call('HDEL', level.ready, owner)
  if add_running(owner, 1) > level.limit and level.limit > 0 then
    -- It was let into the stream before a job of the owner's other level started, or by somebody who knows of no limit.
    add_running(owner, -1)
    drop(level, entry)
    call('ZADD', level.waiting, 0, owner .. ' ' .. entry[2][2] .. ' ' .. entry[2][6])
    return
  end
  hand_over(level, entry, 0)
  if level.waits then admit(level, owner) end
end

local function read(level, consumer, n)
  local reply = call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', n, 'STREAMS', level.stream, '>')
  return reply and reply[1][2] or {{}}
end

local function promote(level)
  for _, member in ipairs(call('ZRANGEBYSCORE', level.delayed, '-inf', now_ms(), 'LIMIT', 0, {PROMOTE_MAX})) do
    local owner = sub(member, 1, 36)
    call('ZREM', level.delayed, member)
    if call('HEXISTS', level.ready, owner) == 1 then call('ZADD', level.waiting, 0, member) else admit(level, owner, member) end
  end
  level.waits = call('EXISTS', level.waiting) == 1
end

local function claim(level)
  local start = '-'
  for _ = 1, {CLAIM_PAGES} do
    local page = redis.pcall('XPENDING', level.stream, GROUP, 'IDLE', lease_ms, start, '+', {CLAIM_PAGE})
    if page.err then
      if not string.find(page.err, 'NOGROUP', 1, true) then error(page.err) end
      -- From the beginning: a group made after a loss of Redis must see what was put before it was made.
      call('XGROUP', 'CREATE', level.stream, GROUP, '0', 'MKSTREAM')
      return
    end
    for _, pending in ipairs(page) do
      if taken == count then return end
      if pending[2] ~= PASSED then
        local entry = call('XCLAIM', level.stream, GROUP, worker, 0, pending[1])[1]
        if not entry then
          call('XACK', level.stream, GROUP, pending[1])
        elseif entry[2][4] then
          hand_over(level, entry, 1)
        else
          drop(level, entry)
        end
      end
    end
    if #page < {CLAIM_PAGE} then return end
    start = '(' .. page[#page][1]
  end
end

-- The oldest parked entries; their counter of deliveries began with 1 and counts how often each was passed over.
local function parked(level)
  local look, pending = {{}}, call('XPENDING', level.stream, GROUP, '-', '+', {LOOK_AHEAD}, PASSED)
  for _, item in ipairs(pending) do
    local entry = call('XRANGE', level.stream, item[1], item[1])[1]
    if entry then
      entry.passes = item[4] - 1
      look[#look + 1] = entry
    else
      call('XACK', level.stream, GROUP, item[1])
    end
  end
  level.parked_more = #pending == {LOOK_AHEAD}
  return look
end

local function choose(look)
  if look[1].passes >= {PASSES_MAX} then return 1 end  -- none was passed more often than one that is older
  for n, entry in ipairs(look) do
    if warm[entry[2][6]] then return n end
  end
  return 1
end

local function deliver_from(level, look)
  local at = choose(look)
  local entry = table.remove(look, at)
  if at > 1 then
    local passed = {{}}
    for n = 1, at - 1 do
      passed[n] = look[n][1]
      look[n].passes = look[n].passes + 1
    end
    call('XCLAIM', level.stream, GROUP, PASSED, 0, unpack(passed))
  end
  call('XCLAIM', level.stream, GROUP, worker, 0, entry[1], 'JUSTID')
  deliver(level, entry)
end

local function fill(level, last)
  if taken >= last then return end
  local look = level.look or parked(level)
  while taken < last do
    if level.parked_more then look = parked(level) end
    if #look == 0 and not choosy then
      local fresh = read(level, worker, last - taken)
      if #fresh == 0 then break end
      for _, entry in ipairs(fresh) do deliver(level, entry) end
    elseif #look == 0 then
      local entry = read(level, worker, 1)[1]
      if not entry then break end
      if warm[entry[2][6]] then
        deliver(level, entry)
      else
        call('XCLAIM', level.stream, GROUP, PASSED, 0, entry[1], 'RETRYCOUNT', 1, 'JUSTID')
        entry.passes = 0
        look[1] = entry
      end
    end
    if #look > 0 then
      if choosy and #look < {LOOK_AHEAD} then
        for _, entry in ipairs(read(level, PASSED, {LOOK_AHEAD} - #look)) do
          entry.passes = 0
          look[#look + 1] = entry
        end
      end
      deliver_from(level, look)
    end
  end
  level.look = look
end

local FREE, PRO = LEVELS[1], LEVELS[2]
promote(PRO)
promote(FREE)
claim(PRO)
claim(FREE)
-- Three of four go to PRO first, the fourth to FREE first: paid work goes ahead, free work never starves.
local pro = 0
for n = place, place + count - taken - 1 do
  if n % 4 ~= 3 then pro = pro + 1 end
end
fill(PRO, taken + pro)
fill(FREE, count)
fill(PRO, count)
if taken > 0 then return {{entries}} end

local function last_id(level)
  local newest = call('XREVRANGE', level.stream, '+', '-', 'COUNT', 1)[1]
  return newest and newest[1] or '0-0'
end

local wait_ms, now = -1, now_ms()
for _, level in ipairs(LEVELS) do
  -- Live workers renew at a third of a lease: what is not renewed by now may be over soon.
  for _, pending in ipairs(call('XPENDING', level.stream, GROUP, 'IDLE', math.floor(lease_ms * {ENDANGERED}), '-', '+', {CLAIM_PAGE})) do
    local left_ms = lease_ms - pending[3]
    if pending[2] ~= PASSED and (wait_ms < 0 or left_ms < wait_ms) then wait_ms = math.max(0, left_ms) end
  end
  local due_ms = call('ZRANGE', level.delayed, 0, 0, 'WITHSCORES')[2]
  if due_ms and (wait_ms < 0 or due_ms - now < wait_ms) then wait_ms = math.max(0, due_ms - now) end
end
return {{entries, last_id(FREE), last_id(PRO), wait_ms}}
"""
)

# ARGV[3..]: worker, then an entry each: level (one digit), space, owner, space, entry id.
DONE = (
    _LEVELS
    + """
local worker = ARGV[3]
local waiting = {}
for _, level in ipairs(LEVELS) do
  if call('EXISTS', level.waiting) == 1 then waiting[#waiting + 1] = level end
end
for n = 4, #ARGV do
  local arg = ARGV[n]
  local level, owner, id = LEVELS[tonumber(sub(arg, 1, 1))], sub(arg, 3, 38), sub(arg, 40)
  local done = level.done or {}
  level.done = done
  if not done[id] and holds(level, worker, id) then
    done[id], done[#done + 1] = true, id
    add_running(owner, -1)
    for _, other in ipairs(waiting) do
      if call('HEXISTS', other.ready, owner) == 0 then admit(other, owner) end
    end
  end
end
for _, level in ipairs(LEVELS) do
  if level.done and #level.done > 0 then
    call('XACK', level.stream, GROUP, unpack(level.done))
    call('XDEL', level.stream, unpack(level.done))
  end
end
"""
)

# As if they had not been taken. ARGV[3..]: worker, lease in milliseconds, then an entry each, the newest first: level and taken over
# or not (one digit each), space, owner, space, job, space, entry id.
UNTAKE = (
    _LEVELS
    + """
local worker, lease_ms = ARGV[3], ARGV[4]
for n = 5, #ARGV do
  local arg = ARGV[n]
  local level, taken_over = LEVELS[tonumber(sub(arg, 1, 1))], sub(arg, 2, 2) == '1'
  local owner, job, id = sub(arg, 4, 39), sub(arg, 41, 76), sub(arg, 78)
  if not holds(level, worker, id) then  -- somebody has claimed it, or Redis was emptied
  elseif taken_over then
    call('XCLAIM', level.stream, GROUP, worker, 0, id, 'IDLE', lease_ms, 'JUSTID')
  else
    call('XCLAIM', level.stream, GROUP, PASSED, 0, id, 'RETRYCOUNT', 1, 'JUSTID')
    add_running(owner, -1)
    local ready = call('HGET', level.ready, owner)
    if ready then  -- the owner's next, let into the stream meanwhile
      local next_id = sub(ready, 38)
      local entry = call('XRANGE', level.stream, next_id, next_id)[1]
      if entry then
        call('XACK', level.stream, GROUP, next_id)
        call('XDEL', level.stream, next_id)
        call('ZADD', level.waiting, 0, owner .. ' ' .. entry[2][2] .. ' ' .. entry[2][6])
      end
    end
    call('HSET', level.ready, owner, job .. ' ' .. id)
  end
end
"""
)

# ARGV[3..]: a job each: level (one digit), space, member. Returns the numbers, from 0, of those that are nowhere.
MISSING = (
    _LEVELS
    + """
local missing = {}
for n = 3, #ARGV do
  local arg = ARGV[n]
  local level, member = LEVELS[tonumber(sub(arg, 1, 1))], sub(arg, 3)
  local ready = call('HGET', level.ready, sub(member, 1, 36))
  if not (ready and sub(ready, 1, 36) == sub(member, 38, 73))
    and not call('ZSCORE', level.waiting, member) and not call('ZSCORE', level.delayed, member) then
    missing[#missing + 1] = n - 3
  end
end
return missing
"""
)

# KEYS: stream, alive key of the job. ARGV: worker, entry id, lease in milliseconds.
RENEW = f"""
local pending = redis.pcall('XPENDING', KEYS[1], '{GROUP}', ARGV[2], ARGV[2], 1)
if pending.err and not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
local holder = pending[1] and pending[1][2]
if holder and holder ~= ARGV[1] then return 'TAKEN' end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
if not holder then return 'GONE' end
redis.call('XCLAIM', KEYS[1], '{GROUP}', ARGV[1], 0, ARGV[2], 'JUSTID')
return 'HELD'
"""

# KEYS: mark. ARGV[1]: 1 to set the mark. Returns the run id of the server that has the pool's slot, its time in milliseconds, the mark.
LIFE = """
local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[1] == '1' then redis.call('SET', KEYS[1], string.format('%s %.0f', run_id, now_ms)) end
return {run_id, now_ms, redis.call('GET', KEYS[1])}
"""
