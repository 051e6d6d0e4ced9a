-- Indexes for what 0002 added, made while jobs go on.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction

-- Owners are served in turn: places are counted by owner.
CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_waiting_by_owner ON jobs (pool, priority, owner_id, job_id) WHERE state = 1;

CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_running_by_owner ON jobs (owner_id, pool) WHERE state = 2;

CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_failed ON jobs (finish_time DESC, job_id DESC) WHERE state = 4;

CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_failed_by_fingerprint ON jobs (fingerprint, finish_time) WHERE state = 4;

CREATE INDEX CONCURRENTLY IF NOT EXISTS jobs_ended ON jobs (finish_time) WHERE state >= 3;

CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_by_job ON outbox (job_id);

CREATE INDEX CONCURRENTLY IF NOT EXISTS requests_by_age ON requests (create_time) WHERE intent IS NULL;
