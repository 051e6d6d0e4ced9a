-- Indexes for what 0006 counts, made while jobs go on.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction

CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_open_by_owner ON jobs (owner_id) INCLUDE (estimated_cost) WHERE state < 3;

CREATE INDEX CONCURRENTLY IF NOT EXISTS requests_unfinished_by_owner ON requests (owner_id) WHERE intent IS NOT NULL;
