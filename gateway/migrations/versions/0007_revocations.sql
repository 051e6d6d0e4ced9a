-- Access tokens that stop working before they expire: those of a session, an API key or an account issued until revoke_time.
-- Rows are swept when no such token can be alive any more.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

CREATE TABLE gateway.revocations (
    revocation_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL CONSTRAINT revocations_kind CHECK (kind IN ('session', 'api_key', 'user')),
    subject_id uuid NOT NULL,
    revoke_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX ix_revocations_create_time ON gateway.revocations (create_time, revocation_id);

CREATE INDEX ix_revocations_subject_id ON gateway.revocations (subject_id, revoke_time);
