-- Since when an account has its plan: the months of its grants are counted from there.
--
-- Here what takes a moment: the column, empty as yet for the accounts there are. 0003 fills it.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE gateway.users ADD COLUMN plan_start_time timestamptz;

-- Apart from the column itself: a default that comes with it would date the plans of all accounts to this moment. A gateway that
-- does not know the column yet makes accounts with it.
ALTER TABLE gateway.users ALTER COLUMN plan_start_time SET DEFAULT now();

-- Gives every account without a start of its plan the one it had: plans could not be changed until now. For 0003, which drops it.
-- In batches, each its own transaction, along the primary key: nobody waits for a row longer than a batch takes.
CREATE PROCEDURE gateway.fill_plan_start_times(p_batch integer) LANGUAGE plpgsql AS $$
DECLARE
    highest constant uuid := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    batch_first uuid := '00000000-0000-0000-0000-000000000000';
    batch_last uuid;
BEGIN
    LOOP
        SELECT u.user_id INTO batch_last FROM gateway.users AS u
        WHERE u.user_id >= batch_first
        ORDER BY u.user_id
        OFFSET p_batch LIMIT 1;
        batch_last := coalesce(batch_last, highest);
        UPDATE gateway.users AS u SET plan_start_time = u.create_time
        WHERE u.user_id BETWEEN batch_first AND batch_last AND u.plan_start_time IS NULL;
        COMMIT;
        EXIT WHEN batch_last = highest;
        batch_first := batch_last;
    END LOOP;
END
$$;
