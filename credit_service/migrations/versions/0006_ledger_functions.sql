-- The functions that are the only way to move credits, now with promotional credits (lots), ceilings, receipts and clawbacks, and the
-- audit of all of it. The rules of 0001 hold: the account's row is locked first, and with it all that belongs to the user (lots, ceilings,
-- reservations); decisions are taken after that; a refusal is an outcome and no exception; time is clock_timestamp().
-- squawk-ignore-file ban-drop-function, ban-drop-constraint

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE credits.entries DROP CONSTRAINT entries_once;

-- What an event is about, beside who and how much.
CREATE TYPE credits.occasion AS (reservation_id uuid, top_up_id uuid, note text, lines jsonb);

-- What an event moves in one lot; part of what it moves in all.
CREATE TYPE credits.lot_move AS (lot_id bigint, available bigint, reserved bigint);

DROP FUNCTION credits.post(text, uuid, uuid, timestamptz, bigint, bigint, text);

-- Writes one event: moves the user's balance, and that of lots, and adds the entries that prove it. What the user's sides gain or lose in
-- sum comes from or goes to the account of the house. The caller holds the lock on the account and has checked.
CREATE FUNCTION credits.post(
    p_kind text, p_user_id uuid, p_occasion credits.occasion, p_moment timestamptz,
    p_available bigint, p_reserved bigint, p_house_account text, p_lots credits.lot_move[] DEFAULT NULL,
    OUT event_id bigint, OUT available_millicredits bigint, OUT reserved_millicredits bigint
) LANGUAGE plpgsql AS $$
DECLARE
    lots_available bigint := 0;
    lots_reserved bigint := 0;
BEGIN
    IF p_lots IS NOT NULL THEN
        SELECT sum(move.available), sum(move.reserved) INTO lots_available, lots_reserved FROM unnest(p_lots) AS move;
        UPDATE credits.lots AS lot
        SET available_millicredits = lot.available_millicredits + move.available,
            reserved_millicredits = lot.reserved_millicredits + move.reserved
        FROM unnest(p_lots) AS move
        WHERE lot.lot_id = move.lot_id AND lot.user_id = p_user_id;
    END IF;

    UPDATE credits.accounts AS account
    SET available_millicredits = account.available_millicredits + p_available,
        reserved_millicredits = account.reserved_millicredits + p_reserved,
        promotional_millicredits = account.promotional_millicredits + lots_available,
        version = account.version + 1,
        event_time = p_moment
    WHERE account.user_id = p_user_id
    RETURNING account.available_millicredits, account.reserved_millicredits
    INTO STRICT available_millicredits, reserved_millicredits;

    INSERT INTO credits.events AS event (kind, reservation_id, top_up_id, note, lines, create_time)
    VALUES (p_kind, p_occasion.reservation_id, p_occasion.top_up_id, p_occasion.note, p_occasion.lines, p_moment)
    RETURNING event.event_id INTO event_id;

    IF p_lots IS NULL THEN
        INSERT INTO credits.entries (event_id, account, user_id, amount_millicredits, balance_after_millicredits)
        SELECT post.event_id, side.account, side.user_id, side.amount, side.balance_after
        FROM (VALUES
            (1, 'available', p_user_id, p_available, post.available_millicredits),
            (2, 'reserved', p_user_id, p_reserved, post.reserved_millicredits),
            (3, p_house_account, NULL, -(p_available + p_reserved), NULL)
        ) AS side (position, account, user_id, amount, balance_after)
        WHERE side.amount <> 0
        ORDER BY side.position;
        RETURN;
    END IF;

    -- One entry a side and lot; the rest of a side, which lies in no lot, last. Each says the side's balance after itself.
    INSERT INTO credits.entries (event_id, account, user_id, lot_id, amount_millicredits, balance_after_millicredits)
    SELECT post.event_id, side.account, side.user_id, side.lot_id, side.amount,
        side.balance_after - sum(side.amount) OVER (PARTITION BY side.account)
            + sum(side.amount) OVER (PARTITION BY side.account ORDER BY side.number ROWS UNBOUNDED PRECEDING)
    FROM (
        SELECT 1 AS position, 'available' AS account, p_user_id AS user_id, move.lot_id, move.available AS amount,
            post.available_millicredits AS balance_after, move.number
        FROM unnest(p_lots) WITH ORDINALITY AS move (lot_id, available, reserved, number)
        UNION ALL
        SELECT 1, 'available', p_user_id, NULL, p_available - lots_available, post.available_millicredits, 1 + cardinality(p_lots)
        UNION ALL
        SELECT 2, 'reserved', p_user_id, move.lot_id, move.reserved, post.reserved_millicredits, move.number
        FROM unnest(p_lots) WITH ORDINALITY AS move (lot_id, available, reserved, number)
        UNION ALL
        SELECT 2, 'reserved', p_user_id, NULL, p_reserved - lots_reserved, post.reserved_millicredits, 1 + cardinality(p_lots)
        UNION ALL
        SELECT 3, p_house_account, NULL, NULL, -(p_available + p_reserved), NULL, 1
    ) AS side
    WHERE side.amount <> 0
    ORDER BY side.position, side.number;
END
$$;

-- The time of what happens now on an account. The caller holds its lock.
CREATE FUNCTION credits.moment_of(p_account credits.accounts) RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
    SELECT greatest(clock_timestamp(), p_account.event_time)
$$;

-- Takes away what is left of the lots whose time is over; whether there was any. The caller holds the lock on the account.
CREATE FUNCTION credits.lapse(p_user_id uuid, p_moment timestamptz) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    due credits.lot_move[];
    total bigint;
BEGIN
    SELECT array_agg(ROW(lot.lot_id, -lot.available_millicredits, 0)::credits.lot_move ORDER BY lot.expire_time, lot.lot_id),
        sum(lot.available_millicredits)
    INTO due, total
    FROM credits.lots AS lot
    WHERE lot.user_id = p_user_id AND lot.available_millicredits > 0 AND lot.expire_time <= p_moment;
    IF due IS NULL THEN
        RETURN false;
    END IF;
    PERFORM credits.post('lapse', p_user_id, NULL, p_moment, -total, 0, 'lapsed', due);
    RETURN true;
END
$$;

-- Locks a user's account, which is made if there is none, and shows it without what has lapsed.
CREATE FUNCTION credits.lock_account(p_user_id uuid) RETURNS credits.accounts LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
BEGIN
    SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = p_user_id FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO credits.accounts (user_id) VALUES (p_user_id) ON CONFLICT (user_id) DO NOTHING;
        SELECT * INTO STRICT account FROM credits.accounts AS a WHERE a.user_id = p_user_id FOR UPDATE;
    END IF;
    IF account.promotional_millicredits > 0 AND credits.lapse(p_user_id, credits.moment_of(account)) THEN
        SELECT * INTO STRICT account FROM credits.accounts AS a WHERE a.user_id = p_user_id;
    END IF;
    RETURN account;
END
$$;

-- What an amount takes from lots, the soonest to expire first: (lot, amount, 0) each. NULL: nothing. The caller holds the account's lock and
-- has let lapse what is due.
CREATE FUNCTION credits.draw(p_user_id uuid, p_amount bigint) RETURNS credits.lot_move[] LANGUAGE sql STABLE AS $$
    SELECT array_agg(ROW(taken.lot_id, taken.amount, 0)::credits.lot_move ORDER BY taken.expire_time, taken.lot_id)
    FROM (
        SELECT lot.lot_id, lot.expire_time,
            least(lot.available_millicredits, p_amount - sum(lot.available_millicredits) OVER earlier + lot.available_millicredits) AS amount
        FROM credits.lots AS lot
        WHERE lot.user_id = p_user_id AND lot.available_millicredits > 0
        WINDOW earlier AS (ORDER BY lot.expire_time, lot.lot_id)
    ) AS taken
    WHERE taken.amount > 0
$$;

-- A new lot, empty as yet.
CREATE FUNCTION credits.open_lot(p_user_id uuid, p_expire_time timestamptz) RETURNS bigint LANGUAGE sql AS $$
    INSERT INTO credits.lots (user_id, expire_time) VALUES (p_user_id, p_expire_time) RETURNING lot_id
$$;

-- Whether an amount can come on top of what a user has: the sum of both sides has to stay an int64.
CREATE FUNCTION credits.fits(p_account credits.accounts, p_amount bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT p_amount <= 9223372036854775807 - p_account.available_millicredits - p_account.reserved_millicredits
$$;

DROP FUNCTION credits.grant_credits(uuid, uuid, uuid, bigint, text);

-- Gives credits; with an expiry, promotional ones.
CREATE FUNCTION credits.grant_credits(
    p_actor_id uuid, p_request_id uuid, p_user_id uuid, p_amount bigint, p_reason text, p_expire_time timestamptz DEFAULT NULL,
    OUT outcome text, OUT available_millicredits bigint, OUT reserved_millicredits bigint
) LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    known credits.grants;
    posted record;
    lots credits.lot_move[];
BEGIN
    IF p_amount < 1 THEN
        outcome := 'amount_out_of_range';
        RETURN;
    END IF;

    account := credits.lock_account(p_user_id);
    SELECT * INTO known FROM credits.grants AS g WHERE g.actor_id = p_actor_id AND g.request_id = p_request_id;
    IF FOUND THEN
        IF (known.user_id, known.amount_millicredits, known.reason, known.expire_time)
            IS NOT DISTINCT FROM (p_user_id, p_amount, p_reason, p_expire_time) THEN
            outcome := 'ok';
            available_millicredits := known.available_after_millicredits;
            reserved_millicredits := known.reserved_after_millicredits;
        ELSE
            outcome := 'reused';
        END IF;
        RETURN;
    END IF;

    IF NOT credits.fits(account, p_amount) THEN
        outcome := 'amount_out_of_range';
        RETURN;
    ELSIF p_expire_time <= credits.moment_of(account) THEN
        outcome := 'expire_time_passed';
        RETURN;
    END IF;

    BEGIN
        IF p_expire_time IS NOT NULL THEN
            lots := ARRAY[ROW(credits.open_lot(p_user_id, p_expire_time), p_amount, 0)::credits.lot_move];
        END IF;
        SELECT * INTO STRICT posted
        FROM credits.post('grant', p_user_id, ROW(NULL, NULL, p_reason, NULL), credits.moment_of(account), p_amount, 0, 'grants', lots);
        INSERT INTO credits.grants (
            actor_id, request_id, user_id, amount_millicredits, reason, expire_time,
            available_after_millicredits, reserved_after_millicredits, event_id
        ) VALUES (
            p_actor_id, p_request_id, p_user_id, p_amount, p_reason, p_expire_time,
            posted.available_millicredits, posted.reserved_millicredits, posted.event_id
        );
    EXCEPTION WHEN unique_violation THEN
        -- The same id was being used for another user at this very moment, under another account's lock.
        outcome := 'reused';
        RETURN;
    END;
    outcome := 'ok';
    available_millicredits := posted.available_millicredits;
    reserved_millicredits := posted.reserved_millicredits;
END
$$;

-- Takes available credits back, in the order in which they would be spent. Where they do not suffice, `available_millicredits` says what is
-- there.
CREATE FUNCTION credits.clawback(
    p_actor_id uuid, p_request_id uuid, p_user_id uuid, p_amount bigint, p_reason text,
    OUT outcome text, OUT available_millicredits bigint, OUT reserved_millicredits bigint
) LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    known credits.clawbacks;
    posted record;
BEGIN
    IF p_amount < 1 THEN
        outcome := 'amount_out_of_range';
        RETURN;
    END IF;

    account := credits.lock_account(p_user_id);
    SELECT * INTO known FROM credits.clawbacks AS c WHERE c.actor_id = p_actor_id AND c.request_id = p_request_id;
    IF FOUND THEN
        IF (known.user_id, known.amount_millicredits, known.reason) = (p_user_id, p_amount, p_reason) THEN
            outcome := 'ok';
            available_millicredits := known.available_after_millicredits;
            reserved_millicredits := known.reserved_after_millicredits;
        ELSE
            outcome := 'reused';
        END IF;
        RETURN;
    END IF;

    IF account.available_millicredits < p_amount THEN
        outcome := 'insufficient';
        available_millicredits := account.available_millicredits;
        RETURN;
    END IF;

    BEGIN
        SELECT * INTO STRICT posted
        FROM credits.post(
            'clawback', p_user_id, ROW(NULL, NULL, p_reason, NULL), credits.moment_of(account), -p_amount, 0, 'grants',
            (SELECT array_agg(ROW(lot_id, -available, 0)::credits.lot_move) FROM unnest(credits.draw(p_user_id, p_amount)))
        );
        INSERT INTO credits.clawbacks (
            actor_id, request_id, user_id, amount_millicredits, reason,
            available_after_millicredits, reserved_after_millicredits, event_id
        ) VALUES (
            p_actor_id, p_request_id, p_user_id, p_amount, p_reason,
            posted.available_millicredits, posted.reserved_millicredits, posted.event_id
        );
    EXCEPTION WHEN unique_violation THEN
        outcome := 'reused';
        RETURN;
    END;
    outcome := 'ok';
    available_millicredits := posted.available_millicredits;
    reserved_millicredits := posted.reserved_millicredits;
END
$$;

-- Gives the credits of one month of a plan, once. What is left of the months before goes with it: until then it lasts, so that nobody is
-- without credits between two months. `known`: this month, or one that it overlaps, was given before.
CREATE FUNCTION credits.grant_plan(
    p_user_id uuid, p_plan text, p_start_time timestamptz, p_end_time timestamptz, p_expire_time timestamptz, p_amount bigint
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    posted record;
    before credits.lot_move[];
    left_over bigint;
BEGIN
    -- Asked for every member in every round: mostly answered without a lock.
    IF EXISTS (SELECT 1 FROM credits.plan_grants AS g WHERE g.user_id = p_user_id AND g.plan = p_plan AND g.end_time > p_start_time) THEN
        RETURN 'known';
    END IF;
    account := credits.lock_account(p_user_id);
    IF EXISTS (SELECT 1 FROM credits.plan_grants AS g WHERE g.user_id = p_user_id AND g.plan = p_plan AND g.end_time > p_start_time) THEN
        RETURN 'known';
    ELSIF p_amount < 1 OR NOT credits.fits(account, p_amount) THEN
        RETURN 'amount_out_of_range';
    END IF;
    SELECT array_agg(ROW(lot.lot_id, -lot.available_millicredits, 0)::credits.lot_move ORDER BY lot.expire_time, lot.lot_id),
        sum(lot.available_millicredits)
    INTO before, left_over
    FROM credits.plan_grants AS g
    JOIN credits.entries AS e ON e.event_id = g.event_id
    JOIN credits.lots AS lot ON lot.lot_id = e.lot_id
    WHERE g.user_id = p_user_id AND g.plan = p_plan AND lot.available_millicredits > 0;
    IF before IS NOT NULL THEN
        PERFORM credits.post('lapse', p_user_id, NULL, credits.moment_of(account), -left_over, 0, 'lapsed', before);
    END IF;
    SELECT * INTO STRICT posted
    FROM credits.post(
        'plan_grant', p_user_id, ROW(NULL, NULL, p_plan, NULL), credits.moment_of(account), p_amount, 0, 'grants',
        ARRAY[ROW(credits.open_lot(p_user_id, p_expire_time), p_amount, 0)::credits.lot_move]
    );
    INSERT INTO credits.plan_grants (user_id, plan, start_time, end_time, expire_time, amount_millicredits, event_id)
    VALUES (p_user_id, p_plan, p_start_time, p_end_time, p_expire_time, p_amount, posted.event_id);
    RETURN 'ok';
END
$$;

-- Bounds what a user (`p_api_key_id` nil) or an API key may spend; without any bound the ceiling goes. What is spent is counted from the
-- reservations, then kept by `reserve` and `settle`.
CREATE FUNCTION credits.set_ceiling(
    p_user_id uuid, p_api_key_id uuid, p_daily bigint, p_monthly bigint, p_keys_max integer,
    OUT outcome text, OUT ceiling credits.ceilings
) LANGUAGE plpgsql AS $$
DECLARE
    today date;
BEGIN
    today := (credits.moment_of(credits.lock_account(p_user_id)) AT TIME ZONE 'UTC')::date;
    ceiling.user_id := p_user_id;
    ceiling.api_key_id := p_api_key_id;
    ceiling.daily_millicredits := p_daily;
    ceiling.monthly_millicredits := p_monthly;
    ceiling.day := today;
    ceiling.month := date_trunc('month', today)::date;
    SELECT coalesce(sum(r.spent) FILTER (WHERE r.create_time >= today::timestamp AT TIME ZONE 'UTC'), 0), coalesce(sum(r.spent), 0)
    INTO ceiling.spent_today_millicredits, ceiling.spent_this_month_millicredits
    FROM (
        SELECT CASE r.state WHEN 'held' THEN r.amount_millicredits ELSE r.captured_millicredits END AS spent, r.create_time
        FROM credits.reservations AS r
        WHERE r.user_id = p_user_id AND r.create_time >= ceiling.month::timestamp AT TIME ZONE 'UTC'
            AND (p_api_key_id = '00000000-0000-0000-0000-000000000000' OR r.api_key_id = p_api_key_id)
    ) AS r;

    -- Before anything is changed: who has too many keeps those there are.
    IF num_nonnulls(p_daily, p_monthly) > 0 AND p_api_key_id <> '00000000-0000-0000-0000-000000000000' AND (
        SELECT count(*) FROM credits.ceilings AS c
        WHERE c.user_id = p_user_id AND c.api_key_id NOT IN ('00000000-0000-0000-0000-000000000000', p_api_key_id)
    ) >= p_keys_max THEN
        outcome := 'too_many';
        RETURN;
    END IF;
    outcome := 'ok';
    DELETE FROM credits.ceilings AS c WHERE c.user_id = p_user_id AND c.api_key_id = p_api_key_id;
    IF num_nonnulls(p_daily, p_monthly) = 0 THEN
        RETURN;
    END IF;
    INSERT INTO credits.ceilings SELECT (ceiling).*;
END
$$;

ALTER TYPE credits.reservation_answer
    ADD ATTRIBUTE model text,
    ADD ATTRIBUTE ceiling_period text,
    ADD ATTRIBUTE ceiling_millicredits bigint,
    ADD ATTRIBUTE ceiling_spent_millicredits numeric,
    ADD ATTRIBUTE ceiling_api_key_id uuid,
    ADD ATTRIBUTE ceiling_reset_time timestamptz;

CREATE OR REPLACE FUNCTION credits.answer(
    p_outcome text, p_reservation credits.reservations, p_available bigint DEFAULT NULL
) RETURNS credits.reservation_answer LANGUAGE sql IMMUTABLE AS $$
    SELECT (
        p_outcome, p_available, p_reservation.reservation_id, p_reservation.user_id, p_reservation.state,
        p_reservation.amount_millicredits, p_reservation.captured_millicredits, p_reservation.expire_time,
        p_reservation.create_time, p_reservation.job_id, p_reservation.model, NULL, NULL, NULL, NULL, NULL
    )::credits.reservation_answer
$$;

-- Counts an amount against the ceilings of a user and of an API key, or says which of them it would break: then nothing is counted. The
-- caller holds the account's lock.
CREATE FUNCTION credits.count_spending(
    p_user_id uuid, p_api_key_id uuid, p_amount bigint, p_moment timestamptz
) RETURNS credits.reservation_answer LANGUAGE plpgsql AS $$
DECLARE
    today constant date := (p_moment AT TIME ZONE 'UTC')::date;
    this_month constant date := date_trunc('month', today)::date;
    keys constant uuid[] := ARRAY['00000000-0000-0000-0000-000000000000', p_api_key_id];
    ceiling credits.ceilings;
    broken credits.reservation_answer;
BEGIN
    FOR ceiling IN
        SELECT c.* FROM credits.ceilings AS c WHERE c.user_id = p_user_id AND c.api_key_id = ANY (keys) ORDER BY c.api_key_id
    LOOP
        broken.ceiling_spent_millicredits := CASE WHEN ceiling.day = today THEN ceiling.spent_today_millicredits ELSE 0 END;
        IF broken.ceiling_spent_millicredits + p_amount > ceiling.daily_millicredits THEN
            broken.ceiling_period := 'day';
            broken.ceiling_millicredits := ceiling.daily_millicredits;
            broken.ceiling_reset_time := (today + 1)::timestamp AT TIME ZONE 'UTC';
        ELSE
            broken.ceiling_spent_millicredits := CASE WHEN ceiling.month = this_month THEN ceiling.spent_this_month_millicredits ELSE 0 END;
            CONTINUE WHEN broken.ceiling_spent_millicredits + p_amount > ceiling.monthly_millicredits IS NOT TRUE;
            broken.ceiling_period := 'month';
            broken.ceiling_millicredits := ceiling.monthly_millicredits;
            broken.ceiling_reset_time := (this_month + interval '1 month') AT TIME ZONE 'UTC';
        END IF;
        broken.outcome := 'ceiling';
        broken.ceiling_api_key_id := nullif(ceiling.api_key_id, '00000000-0000-0000-0000-000000000000');
        RETURN broken;
    END LOOP;
    IF FOUND THEN
        UPDATE credits.ceilings AS c
        SET spent_today_millicredits = p_amount + CASE WHEN c.day = today THEN c.spent_today_millicredits ELSE 0 END,
            day = today,
            spent_this_month_millicredits = p_amount + CASE WHEN c.month = this_month THEN c.spent_this_month_millicredits ELSE 0 END,
            month = this_month
        WHERE c.user_id = p_user_id AND c.api_key_id = ANY (keys);
    END IF;
    RETURN NULL;
END
$$;

DROP FUNCTION credits.reserve(uuid, uuid, uuid, bigint, interval);

CREATE FUNCTION credits.reserve(
    p_reservation_id uuid, p_job_id uuid, p_user_id uuid, p_amount bigint, p_ttl interval,
    p_model text DEFAULT '', p_api_key_id uuid DEFAULT NULL
) RETURNS credits.reservation_answer LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    known credits.reservations;
    moment timestamptz;
    refusal credits.reservation_answer;
    lots credits.lot_move[];
BEGIN
    IF p_amount < 1 THEN
        RETURN credits.answer('amount_out_of_range', NULL);
    END IF;

    SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = p_user_id FOR UPDATE;
    moment := credits.moment_of(account);
    SELECT * INTO known FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id;
    IF FOUND THEN
        -- Without the model, which only explains: a hold from before holds named it is repeated with it.
        IF (known.job_id, known.user_id, known.amount_millicredits, known.ttl, known.api_key_id)
            IS DISTINCT FROM (p_job_id, p_user_id, p_amount, p_ttl, p_api_key_id) THEN
            RETURN credits.answer('reused', NULL);
        END IF;
        -- The account is locked already. A hold that has run out is not shown as one.
        RETURN credits.answer('ok', (credits.lock_reservation(p_reservation_id)).reservation);
    END IF;

    IF account.promotional_millicredits > 0 AND credits.lapse(p_user_id, moment) THEN
        SELECT * INTO STRICT account FROM credits.accounts AS a WHERE a.user_id = p_user_id;
    END IF;
    IF account.user_id IS NULL OR account.available_millicredits < p_amount THEN
        RETURN credits.answer('insufficient', NULL, coalesce(account.available_millicredits, 0));
    END IF;
    refusal := credits.count_spending(p_user_id, p_api_key_id, p_amount, moment);
    IF refusal.outcome IS NOT NULL THEN
        RETURN refusal;
    END IF;
    IF account.promotional_millicredits > 0 THEN
        lots := credits.draw(p_user_id, p_amount);
    END IF;

    INSERT INTO credits.reservations AS r (
        reservation_id, job_id, user_id, amount_millicredits, ttl, expire_time, create_time, model, api_key_id, promotional_millicredits
    ) VALUES (
        p_reservation_id, p_job_id, p_user_id, p_amount, p_ttl, moment + p_ttl, moment, p_model, p_api_key_id,
        (SELECT coalesce(sum(move.available), 0) FROM unnest(lots) AS move)
    )
    ON CONFLICT (reservation_id) DO NOTHING
    RETURNING * INTO known;
    IF NOT FOUND THEN
        -- The same id was being used for another user at this very moment, under another account's lock. What was counted is counted back.
        PERFORM credits.uncount_spending(p_user_id, p_api_key_id, p_amount, moment);
        RETURN credits.answer('reused', NULL);
    END IF;
    IF lots IS NOT NULL THEN
        SELECT array_agg(ROW(move.lot_id, -move.available, move.available)::credits.lot_move) INTO lots FROM unnest(lots) AS move;
    END IF;
    PERFORM credits.post('reserve', p_user_id, ROW(p_reservation_id, NULL, NULL, NULL), moment, -p_amount, p_amount, NULL, lots);
    RETURN credits.answer('ok', known);
END
$$;

-- Takes back what was counted against ceilings when credits were held at `p_held_time`, if their day or month is still that of the hold.
CREATE FUNCTION credits.uncount_spending(
    p_user_id uuid, p_api_key_id uuid, p_amount bigint, p_held_time timestamptz
) RETURNS void LANGUAGE sql AS $$
    UPDATE credits.ceilings AS c
    SET spent_today_millicredits = c.spent_today_millicredits - CASE WHEN c.day = held.day THEN p_amount ELSE 0 END,
        spent_this_month_millicredits = c.spent_this_month_millicredits - CASE WHEN c.month = held.month THEN p_amount ELSE 0 END
    FROM (
        SELECT (p_held_time AT TIME ZONE 'UTC')::date AS day, date_trunc('month', p_held_time AT TIME ZONE 'UTC')::date AS month
    ) AS held
    WHERE c.user_id = p_user_id AND c.api_key_id = ANY (ARRAY['00000000-0000-0000-0000-000000000000', p_api_key_id])
        AND (c.day = held.day OR c.month = held.month)
$$;

-- Takes up to p_most of what refunds could not take when they came, because it was held for jobs. There are no purchases before 0007.
CREATE FUNCTION credits.collect_refunds(p_user_id uuid, p_most bigint, p_moment timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
END
$$;

DROP FUNCTION credits.settle(credits.reservations, text, bigint, timestamptz);

-- Ends a hold: p_captured of it is paid, from the lots that expire soonest first; the rest goes back to where it came from, and lapses if
-- its lot's time is over. The caller holds the lock on the account and has checked.
CREATE FUNCTION credits.settle(
    p_held credits.reservations, p_state text, p_captured bigint, p_moment timestamptz, p_lines jsonb DEFAULT NULL
) RETURNS credits.reservations LANGUAGE plpgsql AS $$
DECLARE
    settled credits.reservations;
    event_kind constant text := CASE p_state WHEN 'captured' THEN 'capture' WHEN 'released' THEN 'release' ELSE 'expire' END;
    returned constant bigint := p_held.amount_millicredits - p_captured;
    lots credits.lot_move[];
BEGIN
    UPDATE credits.reservations AS r
    SET state = p_state, captured_millicredits = p_captured, settle_time = p_moment
    WHERE r.reservation_id = p_held.reservation_id AND r.state = 'held'
    RETURNING * INTO STRICT settled;
    IF p_held.promotional_millicredits > 0 THEN
        SELECT array_agg(ROW(held.lot_id, held.amount - greatest(0, least(held.amount, p_captured - held.before)), -held.amount)::credits.lot_move
            ORDER BY held.expire_time, held.lot_id)
        INTO lots
        FROM (
            SELECT lot.lot_id, lot.expire_time, e.amount_millicredits AS amount,
                sum(e.amount_millicredits) OVER (ORDER BY lot.expire_time, lot.lot_id) - e.amount_millicredits AS before
            FROM credits.events AS v
            JOIN credits.entries AS e USING (event_id)
            JOIN credits.lots AS lot USING (lot_id)
            WHERE v.reservation_id = p_held.reservation_id AND v.kind = 'reserve' AND e.account = 'reserved'
        ) AS held;
    END IF;
    PERFORM credits.post(
        event_kind, p_held.user_id, ROW(p_held.reservation_id, NULL, NULL, p_lines), p_moment,
        returned, -p_held.amount_millicredits, 'revenue', lots
    );
    IF returned > 0 THEN
        PERFORM credits.uncount_spending(p_held.user_id, p_held.api_key_id, returned, p_held.create_time);
        IF lots IS NOT NULL THEN
            PERFORM credits.lapse(p_held.user_id, p_moment);
        END IF;
        PERFORM credits.collect_refunds(p_held.user_id, returned, p_moment);
    END IF;
    RETURN settled;
END
$$;

-- Locks the account of a reservation and shows the reservation as it stands under the lock; a hold whose time is over is expired on the way.
-- NULL: there was no such reservation. One that is made at this very moment must not be seen either: its account is not locked.
CREATE OR REPLACE FUNCTION credits.lock_reservation(
    p_reservation_id uuid, OUT moment timestamptz, OUT reservation credits.reservations
)
LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
BEGIN
    SELECT * INTO account FROM credits.accounts AS a
    WHERE a.user_id = (SELECT r.user_id FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id)
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    moment := credits.moment_of(account);
    SELECT * INTO reservation FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id;
    IF reservation.state = 'held' AND reservation.expire_time <= moment THEN
        reservation := credits.settle(reservation, 'expired', 0, moment);
    END IF;
END
$$;

DROP FUNCTION credits.capture(uuid, bigint);

CREATE FUNCTION credits.capture(p_reservation_id uuid, p_amount bigint, p_lines jsonb DEFAULT NULL)
RETURNS credits.reservation_answer LANGUAGE plpgsql AS $$
DECLARE
    locked record;
    reservation credits.reservations;
BEGIN
    SELECT * INTO STRICT locked FROM credits.lock_reservation(p_reservation_id);
    reservation := locked.reservation;
    IF reservation.reservation_id IS NULL THEN
        RETURN credits.answer('not_found', NULL);
    ELSIF reservation.state = 'captured' THEN
        RETURN credits.answer(
            CASE WHEN reservation.captured_millicredits = p_amount THEN 'ok' ELSE 'reused' END, reservation
        );
    ELSIF reservation.state <> 'held' THEN
        RETURN credits.answer(reservation.state, reservation);
    ELSIF p_amount NOT BETWEEN 1 AND reservation.amount_millicredits THEN
        RETURN credits.answer('amount_out_of_range', reservation);
    END IF;
    RETURN credits.answer('ok', credits.settle(reservation, 'captured', p_amount, locked.moment, p_lines));
END
$$;

-- Expires up to p_limit overdue holds: whose each was, and what went wrong with it. Accounts that are busy are left for the next round: waiting
-- with several accounts locked could deadlock with another expirer. What is wrong with one hold keeps no other. (`expire_due` of 0001 stays
-- for services that are not restarted yet.)
CREATE FUNCTION credits.expire_holds(p_limit integer) RETURNS TABLE (owner_id uuid, problem text) LANGUAGE plpgsql AS $$
DECLARE
    due record;
    account credits.accounts;
    reservation credits.reservations;
BEGIN
    FOR due IN
        SELECT r.reservation_id, r.user_id FROM credits.reservations AS r
        WHERE r.state = 'held' AND r.expire_time <= clock_timestamp()
        ORDER BY r.expire_time
        LIMIT p_limit
    LOOP
        SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = due.user_id FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT * INTO reservation FROM credits.reservations AS r WHERE r.reservation_id = due.reservation_id AND r.state = 'held';
        CONTINUE WHEN NOT FOUND;
        owner_id := due.user_id;
        problem := NULL;
        BEGIN
            PERFORM credits.settle(reservation, 'expired', 0, credits.moment_of(account));
        EXCEPTION WHEN OTHERS THEN
            problem := format('reservation %s: %s', due.reservation_id, sqlerrm);
        END;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Lets promotional credits lapse whose time is over, of up to p_limit users: who they were, and what went wrong. Busy accounts are left for
-- the next round.
CREATE FUNCTION credits.lapse_due(p_limit integer) RETURNS TABLE (owner_id uuid, problem text) LANGUAGE plpgsql AS $$
DECLARE
    due record;
    account credits.accounts;
BEGIN
    FOR due IN
        SELECT lot.user_id FROM credits.lots AS lot
        WHERE lot.available_millicredits > 0 AND lot.expire_time <= clock_timestamp()
        GROUP BY lot.user_id
        ORDER BY min(lot.expire_time)
        LIMIT p_limit
    LOOP
        SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = due.user_id FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        owner_id := due.user_id;
        problem := NULL;
        BEGIN
            CONTINUE WHEN NOT credits.lapse(due.user_id, credits.moment_of(account));
        EXCEPTION WHEN OTHERS THEN
            problem := format('promotional credits of %s: %s', due.user_id, sqlerrm);
        END;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Balances, and what a hold or a lot is about, change in no other way than by these functions: the role may change the columns that they
-- change and no others, and a balance only together with the entries that prove it.
REVOKE UPDATE, DELETE, TRUNCATE ON credits.accounts, credits.lots, credits.reservations FROM CURRENT_USER;
GRANT UPDATE (available_millicredits, reserved_millicredits, promotional_millicredits, version, event_time) ON credits.accounts TO CURRENT_USER;
GRANT UPDATE (available_millicredits, reserved_millicredits) ON credits.lots TO CURRENT_USER;
GRANT UPDATE (state, captured_millicredits, settle_time) ON credits.reservations TO CURRENT_USER;

CREATE FUNCTION credits.refuse_unproven() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
BEGIN
    -- As it is now: one transaction may change it several times.
    SELECT * INTO account FROM credits.accounts AS a WHERE a.user_id = NEW.user_id;
    IF account.available_millicredits <> coalesce((
            SELECT e.balance_after_millicredits FROM credits.entries AS e
            WHERE e.user_id = NEW.user_id AND e.account = 'available' ORDER BY e.entry_id DESC LIMIT 1
        ), 0) OR account.reserved_millicredits <> coalesce((
            SELECT e.balance_after_millicredits FROM credits.entries AS e
            WHERE e.user_id = NEW.user_id AND e.account = 'reserved' ORDER BY e.entry_id DESC LIMIT 1
        ), 0) THEN
        RAISE EXCEPTION 'the entries do not prove the balance' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END
$$;

CREATE CONSTRAINT TRIGGER accounts_proven AFTER INSERT OR UPDATE ON credits.accounts
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION credits.refuse_unproven();

-- The books, checked: a row for everything that does not add up. Empty in a sound ledger.
CREATE OR REPLACE VIEW credits.discrepancies AS
SELECT 'event does not sum to zero' AS problem, e.event_id::text AS subject, 0::numeric AS expected,
    sum(e.amount_millicredits) AS actual
FROM credits.entries AS e GROUP BY e.event_id HAVING sum(e.amount_millicredits) <> 0
UNION ALL
SELECT 'event without entries', v.event_id::text, NULL, NULL
FROM credits.events AS v WHERE NOT EXISTS (SELECT 1 FROM credits.entries AS e WHERE e.event_id = v.event_id)
UNION ALL
SELECT 'balance differs from entries: ' || s.side, a.user_id::text, coalesce(p.proven, 0), s.balance
FROM credits.accounts AS a
CROSS JOIN LATERAL (VALUES ('available', a.available_millicredits), ('reserved', a.reserved_millicredits)) AS s (side, balance)
LEFT JOIN (
    SELECT e.user_id, e.account, sum(e.amount_millicredits) AS proven FROM credits.entries AS e GROUP BY e.user_id, e.account
) AS p ON p.user_id = a.user_id AND p.account = s.side
WHERE s.balance <> coalesce(p.proven, 0)
UNION ALL
SELECT 'balance after an entry differs from the sum so far', c.entry_id::text, c.proven, c.balance_after_millicredits
FROM (
    SELECT e.entry_id, e.balance_after_millicredits,
        sum(e.amount_millicredits) OVER (PARTITION BY e.user_id, e.account ORDER BY e.entry_id) AS proven
    FROM credits.entries AS e WHERE e.user_id IS NOT NULL
) AS c
WHERE c.balance_after_millicredits <> c.proven
UNION ALL
SELECT 'promotional credits differ from entries: ' || s.side, lot.lot_id::text, coalesce(p.proven, 0), s.balance
FROM credits.lots AS lot
CROSS JOIN LATERAL (VALUES ('available', lot.available_millicredits), ('reserved', lot.reserved_millicredits)) AS s (side, balance)
LEFT JOIN (
    SELECT e.lot_id, e.account, sum(e.amount_millicredits) AS proven FROM credits.entries AS e WHERE e.lot_id IS NOT NULL GROUP BY e.lot_id, e.account
) AS p ON p.lot_id = lot.lot_id AND p.account = s.side
WHERE s.balance <> coalesce(p.proven, 0)
UNION ALL
SELECT 'entry moves promotional credits of another user', e.entry_id::text, NULL, NULL
FROM credits.entries AS e JOIN credits.lots AS lot USING (lot_id) WHERE e.user_id <> lot.user_id
UNION ALL
SELECT 'promotional balance differs from what is left of promotional credits', a.user_id::text, coalesce(l.total, 0), a.promotional_millicredits
FROM credits.accounts AS a
LEFT JOIN (
    SELECT lot.user_id, sum(lot.available_millicredits) AS total FROM credits.lots AS lot GROUP BY lot.user_id
) AS l ON l.user_id = a.user_id
WHERE a.promotional_millicredits <> coalesce(l.total, 0)
UNION ALL
SELECT 'reserved balance differs from open holds', a.user_id::text, coalesce(h.held, 0), a.reserved_millicredits
FROM credits.accounts AS a
LEFT JOIN (
    SELECT r.user_id, sum(r.amount_millicredits) AS held FROM credits.reservations AS r WHERE r.state = 'held' GROUP BY r.user_id
) AS h ON h.user_id = a.user_id
WHERE a.reserved_millicredits <> coalesce(h.held, 0)
UNION ALL
SELECT 'promotional part of a hold differs from entries', r.reservation_id::text, coalesce(p.held, 0), r.promotional_millicredits
FROM credits.reservations AS r
LEFT JOIN (
    SELECT v.reservation_id, sum(e.amount_millicredits) AS held
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE v.kind = 'reserve' AND e.account = 'reserved' AND e.lot_id IS NOT NULL GROUP BY v.reservation_id
) AS p ON p.reservation_id = r.reservation_id
WHERE r.promotional_millicredits <> coalesce(p.held, 0)
UNION ALL
SELECT 'reserved promotional credits differ from open holds', lot.lot_id::text, coalesce(h.held, 0), lot.reserved_millicredits
FROM credits.lots AS lot
LEFT JOIN (
    SELECT e.lot_id, sum(e.amount_millicredits) AS held
    FROM credits.reservations AS r
    JOIN credits.events AS v ON v.reservation_id = r.reservation_id AND v.kind = 'reserve'
    JOIN credits.entries AS e USING (event_id)
    WHERE r.state = 'held' AND e.account = 'reserved' AND e.lot_id IS NOT NULL GROUP BY e.lot_id
) AS h ON h.lot_id = lot.lot_id
WHERE lot.reserved_millicredits <> coalesce(h.held, 0)
UNION ALL
SELECT 'more versions of a balance than events', a.user_id::text, NULL, NULL
FROM credits.accounts AS a
LEFT JOIN (
    SELECT e.user_id, count(DISTINCT e.event_id)::numeric AS events FROM credits.entries AS e WHERE e.user_id IS NOT NULL GROUP BY e.user_id
) AS n ON n.user_id = a.user_id
WHERE a.version > coalesce(n.events, 0)
UNION ALL
SELECT 'held amount differs from entries', r.reservation_id::text, r.amount_millicredits, coalesce(p.held, 0)
FROM credits.reservations AS r
LEFT JOIN (
    SELECT v.reservation_id, sum(e.amount_millicredits) AS held
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE v.kind = 'reserve' AND e.account = 'reserved' GROUP BY v.reservation_id
) AS p ON p.reservation_id = r.reservation_id
WHERE r.amount_millicredits <> coalesce(p.held, 0)
UNION ALL
SELECT 'captured amount differs from revenue', r.reservation_id::text, r.captured_millicredits, coalesce(p.paid, 0)
FROM credits.reservations AS r
LEFT JOIN (
    SELECT v.reservation_id, sum(e.amount_millicredits) AS paid
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE e.account = 'revenue' GROUP BY v.reservation_id
) AS p ON p.reservation_id = r.reservation_id
WHERE r.captured_millicredits <> coalesce(p.paid, 0)
UNION ALL
SELECT 'settled reservation without its settling event', r.reservation_id::text, NULL, NULL
FROM credits.reservations AS r
WHERE (r.state <> 'held') <> EXISTS (
    SELECT 1 FROM credits.events AS v
    WHERE v.reservation_id = r.reservation_id
        AND v.kind = CASE r.state WHEN 'captured' THEN 'capture' WHEN 'released' THEN 'release' ELSE 'expire' END
)
UNION ALL
SELECT 'receipt lines differ from what was captured', v.event_id::text, r.captured_millicredits, l.total
FROM credits.events AS v
JOIN credits.reservations AS r USING (reservation_id)
CROSS JOIN LATERAL (
    SELECT coalesce(sum((line ->> 'amount_millicredits')::numeric), 0) AS total FROM jsonb_array_elements(v.lines) AS line
) AS l
WHERE v.lines IS NOT NULL AND l.total <> r.captured_millicredits
UNION ALL
-- From both sides: an event without its record, and a record whose event is another's.
SELECT 'credits given or taken back differ from what was recorded', coalesce(n.event_id, p.event_id)::text, coalesce(n.amount, 0),
    coalesce(p.moved, 0)
FROM (
    SELECT 'grant' AS kind, g.event_id, g.user_id, g.amount_millicredits AS amount, g.available_after_millicredits AS available_after,
        g.expire_time
    FROM credits.grants AS g
    UNION ALL
    SELECT 'clawback', c.event_id, c.user_id, -c.amount_millicredits, c.available_after_millicredits, NULL FROM credits.clawbacks AS c
    UNION ALL
    SELECT 'plan_grant', g.event_id, g.user_id, g.amount_millicredits, NULL, g.expire_time FROM credits.plan_grants AS g
) AS n
FULL JOIN (
    SELECT v.kind, v.event_id, e.user_id, sum(e.amount_millicredits) AS moved, min(lot.expire_time) AS expire_time,
        (array_agg(e.balance_after_millicredits ORDER BY e.entry_id DESC))[1] AS available_after
    FROM credits.events AS v
    JOIN credits.entries AS e ON e.event_id = v.event_id AND e.account = 'available'
    LEFT JOIN credits.lots AS lot ON lot.lot_id = e.lot_id
    WHERE v.kind IN ('grant', 'clawback', 'plan_grant') GROUP BY v.kind, v.event_id, e.user_id
) AS p ON p.event_id = n.event_id
WHERE (n.kind, n.user_id, n.amount) IS DISTINCT FROM (p.kind, p.user_id, p.moved)
    OR n.available_after <> p.available_after
    OR (n.kind <> 'clawback' AND n.expire_time IS DISTINCT FROM p.expire_time)
UNION ALL
SELECT 'event moves what its kind does not', v.event_id::text, NULL, NULL
FROM credits.events AS v
WHERE EXISTS (
    SELECT 1 FROM credits.entries AS e
    WHERE e.event_id = v.event_id AND NOT CASE v.kind
        WHEN 'grant' THEN (e.account, sign(e.amount_millicredits)) IN (('grants', -1), ('available', 1))
        WHEN 'plan_grant' THEN (e.account, sign(e.amount_millicredits)) IN (('grants', -1), ('available', 1))
        WHEN 'top_up' THEN (e.account, sign(e.amount_millicredits)) IN (('payments', -1), ('available', 1))
        WHEN 'reserve' THEN (e.account, sign(e.amount_millicredits)) IN (('available', -1), ('reserved', 1))
        WHEN 'capture' THEN (e.account, sign(e.amount_millicredits)) IN (('reserved', -1), ('available', 1), ('revenue', 1))
        WHEN 'release' THEN (e.account, sign(e.amount_millicredits)) IN (('reserved', -1), ('available', 1))
        WHEN 'expire' THEN (e.account, sign(e.amount_millicredits)) IN (('reserved', -1), ('available', 1))
        WHEN 'clawback' THEN (e.account, sign(e.amount_millicredits)) IN (('available', -1), ('grants', 1))
        WHEN 'refund' THEN (e.account, sign(e.amount_millicredits)) IN (('available', -1), ('payments', 1))
        WHEN 'lapse' THEN (e.account, sign(e.amount_millicredits)) IN (('available', -1), ('lapsed', 1))
            AND (e.lot_id IS NOT NULL OR e.account = 'lapsed')
    END
)
UNION ALL
SELECT 'event of a reservation moves another user''s credits', v.event_id::text, NULL, NULL
FROM credits.events AS v
JOIN credits.reservations AS r USING (reservation_id)
WHERE EXISTS (SELECT 1 FROM credits.entries AS e WHERE e.event_id = v.event_id AND e.user_id <> r.user_id)
UNION ALL
SELECT 'spending of a ceiling differs from reservations: ' || s.period, c.user_id::text || ' ' || c.api_key_id::text, coalesce(p.spent, 0), s.counted
FROM credits.ceilings AS c
CROSS JOIN LATERAL (VALUES
    ('day', c.spent_today_millicredits, c.day::timestamp AT TIME ZONE 'UTC', (c.day + 1)::timestamp AT TIME ZONE 'UTC'),
    ('month', c.spent_this_month_millicredits, c.month::timestamp AT TIME ZONE 'UTC', (c.month + interval '1 month') AT TIME ZONE 'UTC')
) AS s (period, counted, first_time, end_time)
CROSS JOIN LATERAL (
    SELECT sum(CASE r.state WHEN 'held' THEN r.amount_millicredits ELSE r.captured_millicredits END) AS spent
    FROM credits.reservations AS r
    WHERE r.user_id = c.user_id AND r.create_time >= s.first_time AND r.create_time < s.end_time
        AND (c.api_key_id = '00000000-0000-0000-0000-000000000000' OR r.api_key_id = c.api_key_id)
) AS p
WHERE s.counted <> coalesce(p.spent, 0);
