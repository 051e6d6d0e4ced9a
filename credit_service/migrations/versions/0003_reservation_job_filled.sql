-- Every reservation has a job, and is found by it: done while credits are held and settled.
-- Each statement is a transaction of its own, and the constraint only passes through.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction, constraint-missing-not-valid, ban-drop-constraint

CALL credits.fill_job_ids(1000);

-- The entries of a job are found through its reservations and their events. An index that was half made by a run that failed is
-- there and of no use.
DROP INDEX CONCURRENTLY IF EXISTS credits.reservations_job;
CREATE INDEX CONCURRENTLY reservations_job ON credits.reservations (job_id);
DROP INDEX CONCURRENTLY IF EXISTS credits.events_reservation;
CREATE INDEX CONCURRENTLY events_reservation ON credits.events (reservation_id);

SET lock_timeout = '5s';

-- NOT NULL would read the whole table under a lock that stops everybody, unless a valid constraint says the same.
ALTER TABLE credits.reservations DROP CONSTRAINT IF EXISTS reservations_job_filled;
ALTER TABLE credits.reservations ADD CONSTRAINT reservations_job_filled CHECK (job_id IS NOT NULL) NOT VALID;
ALTER TABLE credits.reservations VALIDATE CONSTRAINT reservations_job_filled;
ALTER TABLE credits.reservations ALTER COLUMN job_id SET NOT NULL;
ALTER TABLE credits.reservations DROP CONSTRAINT reservations_job_filled;

RESET lock_timeout;
