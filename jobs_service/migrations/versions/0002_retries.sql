-- Retries of failed jobs, dead letters, deletion, workers, what estimates are measured by.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE jobs ADD COLUMN failures integer NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN retry_count integer NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN retry_time timestamptz;
-- The hold of a retried job. NULL: the first one, which has the job's id.
ALTER TABLE jobs ADD COLUMN reservation_id uuid;
ALTER TABLE jobs ADD COLUMN failure_reason text;
ALTER TABLE jobs ADD COLUMN fingerprint text;
ALTER TABLE jobs ADD COLUMN estimate_s double precision;

-- A retry under way: the new hold may exist already, the job is not pending yet.
CREATE TABLE retries (
    job_id uuid PRIMARY KEY,
    reservation_id uuid NOT NULL,
    abandoned boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX retries_by_age ON retries (create_time);

-- A job that is gone, whose media may still be there.
CREATE TABLE deletions (
    job_id uuid PRIMARY KEY,
    owner_id uuid NOT NULL,
    delete_time timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE workers (
    worker_id text PRIMARY KEY,
    pools text [] NOT NULL,
    slot_count integer NOT NULL,
    loaded_models text [] NOT NULL,
    seen_time timestamptz NOT NULL
);
