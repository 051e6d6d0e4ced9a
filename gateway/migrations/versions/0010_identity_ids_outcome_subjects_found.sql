-- Every linked identity has an id, and both are found by theirs: done while people sign in and the trail is written.
-- Each statement is a transaction of its own, and the constraint only passes through.
-- squawk-ignore-file constraint-missing-not-valid, ban-drop-constraint, ban-concurrent-index-creation-in-transaction

-- In one go: rows of this table are made and removed, but nobody else changes them, so nobody waits for this.
UPDATE gateway.identities SET identity_id = gen_random_uuid() WHERE identity_id IS NULL;

SET lock_timeout = '5s';

-- NOT NULL would read the whole table under a lock that stops everybody, unless a valid constraint says the same.
ALTER TABLE gateway.identities DROP CONSTRAINT IF EXISTS identities_identity_id_filled;
ALTER TABLE gateway.identities ADD CONSTRAINT identities_identity_id_filled CHECK (identity_id IS NOT NULL) NOT VALID;
ALTER TABLE gateway.identities VALIDATE CONSTRAINT identities_identity_id_filled;
ALTER TABLE gateway.identities ALTER COLUMN identity_id SET NOT NULL;
ALTER TABLE gateway.identities DROP CONSTRAINT identities_identity_id_filled;

RESET lock_timeout;

-- Dropped first: one whose making failed half-way is there and of no use.
DROP INDEX CONCURRENTLY IF EXISTS gateway.ix_identities_identity_id;
CREATE UNIQUE INDEX CONCURRENTLY ix_identities_identity_id ON gateway.identities (identity_id);

DROP INDEX CONCURRENTLY IF EXISTS gateway.ix_audit_outcomes_subject;
CREATE INDEX CONCURRENTLY ix_audit_outcomes_subject ON gateway.audit_outcomes (subject, act_time, audit_entry_id) WHERE subject <> '';
