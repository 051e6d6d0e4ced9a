-- Links to identities of other providers get ids, to be taken back by; and an outcome in the audit trail can tell what its act was
-- done to, where the request did not say.
--
-- Here what takes a moment: the columns. 0010 gives the identities there are their ids, and makes the indexes.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE gateway.identities ADD COLUMN identity_id uuid;

-- Apart from the column itself: a random default that comes with it would write the whole table anew under a lock that stops
-- everybody. A gateway that does not know the column yet links identities with it.
ALTER TABLE gateway.identities ALTER COLUMN identity_id SET DEFAULT gen_random_uuid();

-- Empty where the entry has a subject, which counts; act_time is the entry's, so that one index finds outcomes in the order of lists.
ALTER TABLE gateway.audit_outcomes ADD COLUMN subject text NOT NULL DEFAULT '', ADD COLUMN act_time timestamptz;
