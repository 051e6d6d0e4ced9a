-- A reservation names its job: a failed job that is retried gets a new reservation, whose id is another than the job's.
--
-- Here what takes a moment: the column, empty as yet, and the functions, which fill it from now on. 0003 fills the rows there are.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE credits.reservations ADD COLUMN job_id uuid;

ALTER TYPE credits.reservation_answer ADD ATTRIBUTE job_id uuid;

CREATE OR REPLACE FUNCTION credits.answer(
    p_outcome text, p_reservation credits.reservations, p_available bigint DEFAULT NULL
) RETURNS credits.reservation_answer LANGUAGE sql IMMUTABLE AS $$
    SELECT (
        p_outcome, p_available, p_reservation.reservation_id, p_reservation.user_id, p_reservation.state,
        p_reservation.amount_millicredits, p_reservation.captured_millicredits, p_reservation.expire_time,
        p_reservation.create_time, p_reservation.job_id
    )::credits.reservation_answer
$$;

-- squawk-ignore ban-drop-function
DROP FUNCTION credits.reserve(uuid, uuid, bigint, interval);

CREATE FUNCTION credits.reserve(
    p_reservation_id uuid, p_job_id uuid, p_user_id uuid, p_amount bigint, p_ttl interval
) RETURNS credits.reservation_answer LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    known credits.reservations;
    moment timestamptz;
BEGIN
    IF p_amount < 1 THEN
        RETURN credits.answer('amount_out_of_range', NULL);
    END IF;

    SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = p_user_id FOR UPDATE;
    SELECT * INTO known FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id;
    IF FOUND THEN
        IF (known.job_id, known.user_id, known.amount_millicredits, known.ttl) <> (p_job_id, p_user_id, p_amount, p_ttl) THEN
            RETURN credits.answer('reused', NULL);
        END IF;
        -- The account is locked already. A hold that has run out is not shown as one.
        RETURN credits.answer('ok', (credits.lock_reservation(p_reservation_id)).reservation);
    END IF;

    IF account.user_id IS NULL OR account.available_millicredits < p_amount THEN
        RETURN credits.answer('insufficient', NULL, coalesce(account.available_millicredits, 0));
    END IF;

    moment := clock_timestamp();
    INSERT INTO credits.reservations AS r (reservation_id, job_id, user_id, amount_millicredits, ttl, expire_time, create_time)
    VALUES (p_reservation_id, p_job_id, p_user_id, p_amount, p_ttl, moment + p_ttl, moment)
    ON CONFLICT (reservation_id) DO NOTHING
    RETURNING * INTO known;
    IF NOT FOUND THEN
        -- The same id was being used for another user at this very moment, under another account's lock.
        RETURN credits.answer('reused', NULL);
    END IF;
    PERFORM credits.post('reserve', p_user_id, p_reservation_id, moment, -p_amount, p_amount, NULL);
    RETURN credits.answer('ok', known);
END
$$;

-- Gives every reservation without a job the job with its own id: until now they were the same. For 0003, which drops it.
-- In batches, each its own transaction, along the primary key: nobody waits for a row longer than a batch takes.
CREATE PROCEDURE credits.fill_job_ids(p_batch integer) LANGUAGE plpgsql AS $$
DECLARE
    highest constant uuid := 'ffffffff-ffff-ffff-ffff-ffffffffffff';
    batch_first uuid := '00000000-0000-0000-0000-000000000000';
    batch_last uuid;
BEGIN
    LOOP
        SELECT r.reservation_id INTO batch_last FROM credits.reservations AS r
        WHERE r.reservation_id >= batch_first
        ORDER BY r.reservation_id
        OFFSET p_batch LIMIT 1;
        batch_last := coalesce(batch_last, highest);
        UPDATE credits.reservations AS r SET job_id = r.reservation_id
        WHERE r.reservation_id BETWEEN batch_first AND batch_last AND r.job_id IS NULL;
        COMMIT;
        EXIT WHEN batch_last = highest;
        batch_first := batch_last;
    END LOOP;
END
$$;
