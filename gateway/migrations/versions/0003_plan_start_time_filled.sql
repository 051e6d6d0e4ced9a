-- Every account has a start of its plan: done while accounts are made and used.
-- Each statement is a transaction of its own, and the constraint only passes through.
-- squawk-ignore-file constraint-missing-not-valid, ban-drop-constraint

CALL gateway.fill_plan_start_times(1000);

SET lock_timeout = '5s';

-- NOT NULL would read the whole table under a lock that stops everybody, unless a valid constraint says the same.
ALTER TABLE gateway.users DROP CONSTRAINT IF EXISTS users_plan_start_time_filled;
ALTER TABLE gateway.users ADD CONSTRAINT users_plan_start_time_filled CHECK (plan_start_time IS NOT NULL) NOT VALID;
ALTER TABLE gateway.users VALIDATE CONSTRAINT users_plan_start_time_filled;
ALTER TABLE gateway.users ALTER COLUMN plan_start_time SET NOT NULL;
ALTER TABLE gateway.users DROP CONSTRAINT users_plan_start_time_filled;

RESET lock_timeout;
