-- The ledger: accounts, events, entries, grants, reservations, and the functions that are the only way to move credits.
--
-- Every operation is one function call, so one round trip and one transaction. A function takes its locks in one order:
-- the user's account row first, then everything else; an operation never locks two accounts and waits. It refuses by
-- returning an outcome, because an exception would roll back what a refusal may have to keep (a hold found expired).
-- All decisions are taken after the account is locked, in READ COMMITTED: each statement sees what the last holder of
-- the lock committed. Time is clock_timestamp(): now() is older than the wait for the lock.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

-- One row a user carries both sides of the balance, so that one lock guards them. The accounts of the house (grants,
-- revenue) have no row: a running balance would make every user wait for every other. Theirs is the sum of entries.
CREATE TABLE credits.accounts (
    user_id uuid PRIMARY KEY,
    available_millicredits bigint NOT NULL DEFAULT 0 CHECK (available_millicredits >= 0),
    reserved_millicredits bigint NOT NULL DEFAULT 0 CHECK (reserved_millicredits >= 0),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Releasing every hold must never overflow.
    CONSTRAINT accounts_total_fits CHECK (available_millicredits <= 9223372036854775807 - reserved_millicredits)
);

CREATE TABLE credits.reservations (
    reservation_id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    state text NOT NULL DEFAULT 'held' CHECK (state IN ('held', 'captured', 'released', 'expired')),
    amount_millicredits bigint NOT NULL CHECK (amount_millicredits >= 1),
    captured_millicredits bigint NOT NULL DEFAULT 0
        CHECK (captured_millicredits BETWEEN 0 AND amount_millicredits),
    ttl interval NOT NULL CHECK (ttl > interval '0'),
    expire_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL,
    settle_time timestamptz,
    CONSTRAINT reservations_captured CHECK ((state = 'captured') = (captured_millicredits > 0)),
    CONSTRAINT reservations_settled CHECK ((state = 'held') = (settle_time IS NULL))
);
CREATE INDEX reservations_due ON credits.reservations (expire_time) WHERE state = 'held';
CREATE INDEX reservations_user ON credits.reservations (user_id);

-- One thing that happened; its entries say what it moved.
CREATE TABLE credits.events (
    event_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('grant', 'reserve', 'capture', 'release', 'expire')),
    reservation_id uuid REFERENCES credits.reservations (reservation_id),
    create_time timestamptz NOT NULL,
    CONSTRAINT events_of_reservation CHECK ((kind = 'grant') = (reservation_id IS NULL))
);
-- A reservation is made once and settled once.
CREATE UNIQUE INDEX events_reserved_once ON credits.events (reservation_id) WHERE kind = 'reserve';
CREATE UNIQUE INDEX events_settled_once ON credits.events (reservation_id) WHERE kind IN ('capture', 'release', 'expire');

CREATE TABLE credits.entries (
    entry_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id bigint NOT NULL REFERENCES credits.events (event_id),
    account text NOT NULL CHECK (account IN ('available', 'reserved', 'grants', 'revenue')),
    user_id uuid REFERENCES credits.accounts (user_id),
    amount_millicredits bigint NOT NULL CHECK (amount_millicredits <> 0),
    balance_after_millicredits bigint CHECK (balance_after_millicredits >= 0),
    CONSTRAINT entries_owner CHECK ((account IN ('available', 'reserved')) = (user_id IS NOT NULL)),
    CONSTRAINT entries_balance CHECK ((user_id IS NULL) = (balance_after_millicredits IS NULL)),
    CONSTRAINT entries_once UNIQUE (event_id, account)
);
CREATE INDEX entries_user ON credits.entries (user_id, entry_id) WHERE user_id IS NOT NULL;

-- Who granted what and why, and the answer that was given: a request id is the administrator's own.
CREATE TABLE credits.grants (
    actor_id uuid NOT NULL,
    request_id uuid NOT NULL,
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    amount_millicredits bigint NOT NULL CHECK (amount_millicredits >= 1),
    reason text NOT NULL CHECK (reason <> ''),
    available_after_millicredits bigint NOT NULL,
    reserved_after_millicredits bigint NOT NULL,
    event_id bigint NOT NULL UNIQUE REFERENCES credits.events (event_id),
    PRIMARY KEY (actor_id, request_id)
);
CREATE INDEX grants_user ON credits.grants (user_id);

CREATE FUNCTION credits.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'credits.% is append-only', tg_table_name USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.entries
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.events
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();
CREATE TRIGGER grants_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.grants
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();

-- Beside the triggers: the service's role gives the rights away. It keeps UPDATE on events, which the foreign key of
-- entries needs to lock the row it points at.
REVOKE UPDATE, DELETE, TRUNCATE ON credits.entries, credits.grants FROM CURRENT_USER;
REVOKE DELETE, TRUNCATE ON credits.events FROM CURRENT_USER;

-- All entries of an event are written by one statement, and each statement balances: so every event does.
CREATE FUNCTION credits.refuse_imbalance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM written GROUP BY event_id HAVING sum(amount_millicredits) <> 0) THEN
        RAISE EXCEPTION 'the entries of an event must sum to zero' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER entries_balanced AFTER INSERT ON credits.entries
    REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_imbalance();

-- Writes one event: moves the user's balance and adds the entries that prove it. What the user's sides gain or lose in
-- sum comes from or goes to the account of the house. The caller holds the lock on the account and has checked.
CREATE FUNCTION credits.post(
    p_kind text, p_user_id uuid, p_reservation_id uuid, p_moment timestamptz,
    p_available bigint, p_reserved bigint, p_house_account text,
    OUT event_id bigint, OUT available_millicredits bigint, OUT reserved_millicredits bigint
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE credits.accounts AS account
    SET available_millicredits = account.available_millicredits + p_available,
        reserved_millicredits = account.reserved_millicredits + p_reserved
    WHERE account.user_id = p_user_id
    RETURNING account.available_millicredits, account.reserved_millicredits
    INTO STRICT available_millicredits, reserved_millicredits;

    INSERT INTO credits.events AS event (kind, reservation_id, create_time)
    VALUES (p_kind, p_reservation_id, p_moment)
    RETURNING event.event_id INTO event_id;

    INSERT INTO credits.entries (event_id, account, user_id, amount_millicredits, balance_after_millicredits)
    SELECT post.event_id, side.account, side.user_id, side.amount, side.balance_after
    FROM (VALUES
        (1, 'available', p_user_id, p_available, post.available_millicredits),
        (2, 'reserved', p_user_id, p_reserved, post.reserved_millicredits),
        (3, p_house_account, NULL, -(p_available + p_reserved), NULL)
    ) AS side (position, account, user_id, amount, balance_after)
    WHERE side.amount <> 0
    ORDER BY side.position;
END
$$;

CREATE FUNCTION credits.grant_credits(
    p_actor_id uuid, p_request_id uuid, p_user_id uuid, p_amount bigint, p_reason text,
    OUT outcome text, OUT available_millicredits bigint, OUT reserved_millicredits bigint
) LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    known credits.grants;
    posted record;
BEGIN
    IF p_amount < 1 THEN
        outcome := 'amount_out_of_range';
        RETURN;
    END IF;

    INSERT INTO credits.accounts (user_id) VALUES (p_user_id) ON CONFLICT (user_id) DO NOTHING;
    SELECT * INTO STRICT account FROM credits.accounts AS a WHERE a.user_id = p_user_id FOR UPDATE;

    SELECT * INTO known FROM credits.grants AS g WHERE g.actor_id = p_actor_id AND g.request_id = p_request_id;
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

    IF p_amount > 9223372036854775807 - account.available_millicredits - account.reserved_millicredits THEN
        outcome := 'amount_out_of_range';
        RETURN;
    END IF;

    BEGIN
        SELECT * INTO STRICT posted
        FROM credits.post('grant', p_user_id, NULL, clock_timestamp(), p_amount, 0, 'grants');
        INSERT INTO credits.grants (
            actor_id, request_id, user_id, amount_millicredits, reason,
            available_after_millicredits, reserved_after_millicredits, event_id
        ) VALUES (
            p_actor_id, p_request_id, p_user_id, p_amount, p_reason,
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

-- What the operations on reservations answer. The reservation's columns are NULL when there is none to show.
CREATE TYPE credits.reservation_answer AS (
    outcome text,
    available_millicredits bigint,
    reservation_id uuid,
    user_id uuid,
    state text,
    amount_millicredits bigint,
    captured_millicredits bigint,
    expire_time timestamptz,
    create_time timestamptz
);

CREATE FUNCTION credits.answer(
    p_outcome text, p_reservation credits.reservations, p_available bigint DEFAULT NULL
) RETURNS credits.reservation_answer LANGUAGE sql IMMUTABLE AS $$
    SELECT (
        p_outcome, p_available, p_reservation.reservation_id, p_reservation.user_id, p_reservation.state,
        p_reservation.amount_millicredits, p_reservation.captured_millicredits, p_reservation.expire_time,
        p_reservation.create_time
    )::credits.reservation_answer
$$;

-- Ends a hold: p_captured of it is paid, the rest goes back. The caller holds the lock on the account and has checked.
CREATE FUNCTION credits.settle(
    p_held credits.reservations, p_state text, p_captured bigint, p_moment timestamptz
) RETURNS credits.reservations LANGUAGE plpgsql AS $$
DECLARE
    settled credits.reservations;
    event_kind constant text := CASE p_state WHEN 'captured' THEN 'capture' WHEN 'released' THEN 'release' ELSE 'expire' END;
BEGIN
    UPDATE credits.reservations AS r
    SET state = p_state, captured_millicredits = p_captured, settle_time = p_moment
    WHERE r.reservation_id = p_held.reservation_id AND r.state = 'held'
    RETURNING * INTO STRICT settled;
    PERFORM credits.post(
        event_kind, p_held.user_id, p_held.reservation_id, p_moment,
        p_held.amount_millicredits - p_captured, -p_held.amount_millicredits, 'revenue'
    );
    RETURN settled;
END
$$;

-- Locks the account of a reservation and shows the reservation as it stands under the lock; a hold whose time is over
-- is expired on the way. NULL: no such reservation.
CREATE FUNCTION credits.lock_reservation(
    p_reservation_id uuid, OUT moment timestamptz, OUT reservation credits.reservations
)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM credits.accounts AS a
    WHERE a.user_id = (SELECT r.user_id FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id)
    FOR UPDATE;
    moment := clock_timestamp();
    SELECT * INTO reservation FROM credits.reservations AS r WHERE r.reservation_id = p_reservation_id;
    IF reservation.state = 'held' AND reservation.expire_time <= moment THEN
        reservation := credits.settle(reservation, 'expired', 0, moment);
    END IF;
END
$$;

CREATE FUNCTION credits.reserve(
    p_reservation_id uuid, p_user_id uuid, p_amount bigint, p_ttl interval
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
        IF (known.user_id, known.amount_millicredits, known.ttl) <> (p_user_id, p_amount, p_ttl) THEN
            RETURN credits.answer('reused', NULL);
        END IF;
        -- The account is locked already. A hold that has run out is not shown as one.
        RETURN credits.answer('ok', (credits.lock_reservation(p_reservation_id)).reservation);
    END IF;

    IF account.user_id IS NULL OR account.available_millicredits < p_amount THEN
        RETURN credits.answer('insufficient', NULL, coalesce(account.available_millicredits, 0));
    END IF;

    moment := clock_timestamp();
    INSERT INTO credits.reservations AS r (reservation_id, user_id, amount_millicredits, ttl, expire_time, create_time)
    VALUES (p_reservation_id, p_user_id, p_amount, p_ttl, moment + p_ttl, moment)
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

CREATE FUNCTION credits.capture(p_reservation_id uuid, p_amount bigint)
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
    RETURN credits.answer('ok', credits.settle(reservation, 'captured', p_amount, locked.moment));
END
$$;

CREATE FUNCTION credits.release(p_reservation_id uuid)
RETURNS credits.reservation_answer LANGUAGE plpgsql AS $$
DECLARE
    locked record;
    reservation credits.reservations;
BEGIN
    SELECT * INTO STRICT locked FROM credits.lock_reservation(p_reservation_id);
    reservation := locked.reservation;
    IF reservation.reservation_id IS NULL THEN
        RETURN credits.answer('not_found', NULL);
    ELSIF reservation.state = 'released' THEN
        RETURN credits.answer('ok', reservation);
    ELSIF reservation.state <> 'held' THEN
        RETURN credits.answer(reservation.state, reservation);
    END IF;
    RETURN credits.answer('ok', credits.settle(reservation, 'released', 0, locked.moment));
END
$$;

-- Expires up to p_limit overdue holds; returns how many. Accounts that are busy are left for the next round: waiting
-- with several accounts locked could deadlock with another expirer.
CREATE FUNCTION credits.expire_due(p_limit integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    moment constant timestamptz := clock_timestamp();
    due record;
    reservation credits.reservations;
    expired integer := 0;
BEGIN
    FOR due IN
        SELECT r.reservation_id, r.user_id FROM credits.reservations AS r
        WHERE r.state = 'held' AND r.expire_time <= moment
        ORDER BY r.expire_time
        LIMIT p_limit
    LOOP
        PERFORM 1 FROM credits.accounts AS a WHERE a.user_id = due.user_id FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT * INTO reservation FROM credits.reservations AS r WHERE r.reservation_id = due.reservation_id AND r.state = 'held';
        CONTINUE WHEN NOT FOUND;
        PERFORM credits.settle(reservation, 'expired', 0, clock_timestamp());
        expired := expired + 1;
    END LOOP;
    RETURN expired;
END
$$;

-- The books, checked: a row for everything that does not add up. Empty in a sound ledger.
CREATE VIEW credits.discrepancies AS
SELECT 'event does not sum to zero' AS problem, e.event_id::text AS subject, 0::numeric AS expected,
    sum(e.amount_millicredits) AS actual
FROM credits.entries AS e GROUP BY e.event_id HAVING sum(e.amount_millicredits) <> 0
UNION ALL
SELECT 'event without entries', v.event_id::text, NULL, NULL
FROM credits.events AS v WHERE NOT EXISTS (SELECT 1 FROM credits.entries AS e WHERE e.event_id = v.event_id)
UNION ALL
SELECT 'balance differs from entries: ' || b.side, b.user_id::text, b.proven, b.balance
FROM (
    SELECT a.user_id, s.side, s.balance,
        coalesce((SELECT sum(e.amount_millicredits) FROM credits.entries AS e
            WHERE e.user_id = a.user_id AND e.account = s.side), 0) AS proven
    FROM credits.accounts AS a
    CROSS JOIN LATERAL (VALUES ('available', a.available_millicredits), ('reserved', a.reserved_millicredits)) AS s (side, balance)
) AS b
WHERE b.balance <> b.proven
UNION ALL
SELECT 'balance after an entry differs from the sum so far', c.entry_id::text, c.proven, c.balance_after_millicredits
FROM (
    SELECT e.entry_id, e.balance_after_millicredits,
        sum(e.amount_millicredits) OVER (PARTITION BY e.user_id, e.account ORDER BY e.entry_id) AS proven
    FROM credits.entries AS e WHERE e.user_id IS NOT NULL
) AS c
WHERE c.balance_after_millicredits <> c.proven
UNION ALL
SELECT 'reserved balance differs from open holds', a.user_id::text, h.held, a.reserved_millicredits
FROM credits.accounts AS a
CROSS JOIN LATERAL (
    SELECT coalesce(sum(r.amount_millicredits), 0) AS held FROM credits.reservations AS r
    WHERE r.user_id = a.user_id AND r.state = 'held'
) AS h
WHERE a.reserved_millicredits <> h.held
UNION ALL
SELECT 'captured amount differs from revenue', r.reservation_id::text, r.captured_millicredits, p.paid
FROM credits.reservations AS r
CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.amount_millicredits), 0) AS paid
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE v.reservation_id = r.reservation_id AND e.account = 'revenue'
) AS p
WHERE r.captured_millicredits <> p.paid
UNION ALL
SELECT 'settled reservation without its settling event', r.reservation_id::text, NULL, NULL
FROM credits.reservations AS r
WHERE (r.state <> 'held') <> EXISTS (
    SELECT 1 FROM credits.events AS v
    WHERE v.reservation_id = r.reservation_id
        AND v.kind = CASE r.state WHEN 'captured' THEN 'capture' WHEN 'released' THEN 'release' ELSE 'expire' END
);
