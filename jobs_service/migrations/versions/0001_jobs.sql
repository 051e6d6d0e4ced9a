-- Jobs, submit requests, outbox, offered models.

CREATE TABLE jobs (
    job_id uuid PRIMARY KEY,
    owner_id uuid NOT NULL,
    kind smallint NOT NULL,
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 5),
    version integer NOT NULL CHECK (version >= 1),
    priority smallint NOT NULL,
    model text NOT NULL,
    pool text NOT NULL,
    spec bytea NOT NULL,
    steps_agreed integer NOT NULL CHECK (steps_agreed >= 1),
    estimated_cost bigint NOT NULL CHECK (estimated_cost >= 1),
    attempt integer NOT NULL DEFAULT 0 CHECK (attempt >= 0),
    worker_id text NOT NULL DEFAULT '',
    queue_entry text NOT NULL DEFAULT '',
    steps_done integer NOT NULL DEFAULT 0 CHECK (steps_done >= 0),
    cost bigint CHECK (cost BETWEEN 0 AND estimated_cost),
    assets bytea[] NOT NULL DEFAULT '{}',
    error bytea,
    cancel_requested_time timestamptz,
    start_deadline timestamptz,
    create_time timestamptz NOT NULL DEFAULT now(),
    start_time timestamptz,
    finish_time timestamptz,
    -- A job has ended exactly when it has an end and a price.
    CHECK ((state >= 3) = (finish_time IS NOT NULL)),
    CHECK ((state >= 3) = (cost IS NOT NULL)),
    CHECK ((state = 4) = (error IS NOT NULL))
);

-- job_id is a UUIDv7: its order is the order of submission.
CREATE INDEX jobs_by_owner ON jobs (owner_id, job_id DESC);

CREATE INDEX jobs_waiting ON jobs (pool, priority, job_id) WHERE state = 1;

CREATE INDEX jobs_running ON jobs (start_time) WHERE state = 2;

CREATE INDEX jobs_completed_by_model ON jobs (model, job_id DESC) WHERE state = 3;

CREATE TABLE requests (
    owner_id uuid NOT NULL,
    request_id uuid NOT NULL,
    digest bytea NOT NULL,
    job_id uuid NOT NULL UNIQUE,
    intent bytea,
    abandoned boolean NOT NULL DEFAULT false,
    create_time timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (owner_id, request_id)
);

CREATE INDEX requests_unfinished ON requests (create_time) WHERE intent IS NOT NULL;

CREATE TABLE outbox (
    outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id uuid NOT NULL,
    duty smallint NOT NULL CHECK (duty BETWEEN 1 AND 2),
    failures integer NOT NULL DEFAULT 0,
    due_time timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX outbox_due ON outbox (due_time);

CREATE TABLE models (model_id text PRIMARY KEY, model bytea NOT NULL, seen_time timestamptz NOT NULL);

CREATE TABLE secrets (name text PRIMARY KEY, value bytea NOT NULL);
