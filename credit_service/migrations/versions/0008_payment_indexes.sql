-- Indexes and the check that tie ledger events to purchases, made while credits are held and settled. Each statement is a transaction of
-- its own.
-- squawk-ignore-file ban-concurrent-index-creation-in-transaction

-- However often a payment is told: its credits are given once.
DROP INDEX CONCURRENTLY IF EXISTS credits.events_topped_up_once;
CREATE UNIQUE INDEX CONCURRENTLY events_topped_up_once ON credits.events (top_up_id) WHERE kind = 'top_up';

DROP INDEX CONCURRENTLY IF EXISTS credits.events_top_up;
CREATE INDEX CONCURRENTLY events_top_up ON credits.events (top_up_id) WHERE top_up_id IS NOT NULL;

ALTER TABLE credits.events VALIDATE CONSTRAINT events_top_up;
