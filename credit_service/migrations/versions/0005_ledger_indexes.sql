-- Indexes and checks of what 0004 added, made while credits are held and settled. Each statement is a transaction of its own.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction

-- Several entries of an event may be on one side of a balance: one a lot. 0006 drops the narrower rule.
DROP INDEX CONCURRENTLY IF EXISTS credits.entries_once_a_lot;
CREATE UNIQUE INDEX CONCURRENTLY entries_once_a_lot ON credits.entries (event_id, account, lot_id) NULLS NOT DISTINCT;

DROP INDEX CONCURRENTLY IF EXISTS credits.entries_by_lot;
CREATE INDEX CONCURRENTLY entries_by_lot ON credits.entries (lot_id) WHERE lot_id IS NOT NULL;

-- What was spent since a day began, when a ceiling is set.
DROP INDEX CONCURRENTLY IF EXISTS credits.reservations_user_time;
CREATE INDEX CONCURRENTLY reservations_user_time ON credits.reservations (user_id, create_time);
DROP INDEX CONCURRENTLY IF EXISTS credits.reservations_user;

-- A reservation is made once and settled once, and its events are found by it: one index for what three did.
DROP INDEX CONCURRENTLY IF EXISTS credits.events_once;
CREATE UNIQUE INDEX CONCURRENTLY events_once ON credits.events (reservation_id, (kind = 'reserve')) WHERE reservation_id IS NOT NULL;
DROP INDEX CONCURRENTLY IF EXISTS credits.events_reserved_once;
DROP INDEX CONCURRENTLY IF EXISTS credits.events_settled_once;
DROP INDEX CONCURRENTLY IF EXISTS credits.events_reservation;

ALTER TABLE credits.accounts VALIDATE CONSTRAINT accounts_promotional;
ALTER TABLE credits.reservations VALIDATE CONSTRAINT reservations_promotional;
ALTER TABLE credits.events VALIDATE CONSTRAINT events_kind;
ALTER TABLE credits.events VALIDATE CONSTRAINT events_of_reservation;
ALTER TABLE credits.events VALIDATE CONSTRAINT events_of_top_up;
ALTER TABLE credits.events VALIDATE CONSTRAINT events_lines;
ALTER TABLE credits.entries VALIDATE CONSTRAINT entries_account;
ALTER TABLE credits.entries VALIDATE CONSTRAINT entries_lot;
ALTER TABLE credits.entries VALIDATE CONSTRAINT entries_lot_owner;
