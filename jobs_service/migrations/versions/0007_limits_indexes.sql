-- Indexes for what 0006 counts, made while jobs go on. One whose making failed is left behind invalid, and would pass for made: whatever
-- an earlier attempt left goes first.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction

DROP INDEX CONCURRENTLY IF EXISTS jobs_open_by_owner;
CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_open_by_owner ON jobs (owner_id) INCLUDE (estimated_cost) WHERE state < 3;

DROP INDEX CONCURRENTLY IF EXISTS requests_unfinished_by_owner;
CREATE INDEX CONCURRENTLY IF NOT EXISTS requests_unfinished_by_owner ON requests (owner_id) WHERE intent IS NOT NULL;
