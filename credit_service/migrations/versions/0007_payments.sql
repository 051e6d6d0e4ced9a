-- Credits that are bought: purchases (top-ups), what the payment provider told about them, and the functions that settle them.
--
-- The provider tells each thing at least once and in any order, so every notice is a step up or nothing: the state only climbs (pending,
-- failed, expired, paid, refunded), and what was refunded only grows. The rules of 0001 hold: the user's account is locked first, then
-- the purchase; a refusal is an outcome and no exception.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

CREATE TABLE credits.top_ups (
    -- Of version 7, so that purchases sort by when they were begun.
    top_up_id uuid PRIMARY KEY DEFAULT uuidv7(),
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    request_id uuid NOT NULL,
    provider text NOT NULL CHECK (provider <> ''),
    package_id text NOT NULL CHECK (package_id <> ''),
    amount_millicredits bigint NOT NULL CHECK (amount_millicredits >= 1),
    price_minor bigint NOT NULL CHECK (price_minor >= 1),
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- NULL until the provider has opened the checkout.
    provider_reference text,
    checkout_url text,
    expire_time timestamptz,
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'failed', 'expired', 'paid', 'refunded')),
    pay_time timestamptz,
    -- Money given back so far, as the provider tells it, also before it tells of the payment.
    refunded_minor bigint NOT NULL DEFAULT 0,
    -- The share of the credits that goes with it: what was taken back, and what was spent or held by then.
    refunded_millicredits bigint NOT NULL DEFAULT 0 CHECK (refunded_millicredits >= 0),
    uncollected_millicredits bigint NOT NULL DEFAULT 0 CHECK (uncollected_millicredits >= 0),
    CONSTRAINT top_ups_request UNIQUE (user_id, request_id),
    CONSTRAINT top_ups_opened CHECK (num_nulls(provider_reference, checkout_url, expire_time) IN (0, 3)),
    CONSTRAINT top_ups_paid CHECK ((state IN ('paid', 'refunded')) = (pay_time IS NOT NULL)),
    CONSTRAINT top_ups_refunded CHECK ((state = 'refunded') = (pay_time IS NOT NULL AND refunded_minor = price_minor)),
    CONSTRAINT top_ups_refunded_minor CHECK (refunded_minor BETWEEN 0 AND price_minor),
    -- Proportional, rounded down in favour of the buyer; a full refund takes all.
    CONSTRAINT top_ups_share CHECK (
        refunded_millicredits::numeric + uncollected_millicredits
            = CASE WHEN pay_time IS NULL THEN 0 ELSE div(amount_millicredits::numeric * refunded_minor, price_minor) END
    )
);
CREATE INDEX top_ups_user ON credits.top_ups (user_id, top_up_id);
CREATE INDEX top_ups_uncollected ON credits.top_ups (user_id, top_up_id) WHERE uncollected_millicredits > 0;

-- What was bought, by whom and for how much never changes.
REVOKE UPDATE, DELETE, TRUNCATE ON credits.top_ups FROM CURRENT_USER;
GRANT UPDATE (
    provider_reference, checkout_url, expire_time, state, pay_time, refunded_minor, refunded_millicredits, uncollected_millicredits
) ON credits.top_ups TO CURRENT_USER;

-- Every notice whose signature was good, once, and what came of it.
CREATE TABLE credits.payment_events (
    provider text NOT NULL CHECK (provider <> ''),
    provider_event_id text NOT NULL CHECK (provider_event_id <> ''),
    -- The provider's own word for it, and ours.
    event_type text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('paid', 'failed', 'expired', 'refunded', 'ignored')),
    -- No foreign key: a notice that names a purchase unknown here is kept too.
    top_up_id uuid,
    amount_minor bigint,
    refunded_minor bigint,
    currency text,
    outcome text NOT NULL CHECK (outcome IN ('credited', 'taken_back', 'noted', 'stale', 'ignored', 'unknown_top_up', 'mismatch')),
    event_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (provider, provider_event_id)
);
CREATE INDEX payment_events_top_up ON credits.payment_events (top_up_id) WHERE top_up_id IS NOT NULL;

CREATE TRIGGER payment_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();
REVOKE UPDATE, DELETE, TRUNCATE ON credits.payment_events FROM CURRENT_USER;

ALTER TABLE credits.events
    ADD CONSTRAINT events_top_up FOREIGN KEY (top_up_id) REFERENCES credits.top_ups (top_up_id) NOT VALID;

-- Begins a purchase; the same request again shows it as it stands by then. What it costs is what it cost the first time. `too_many`: p_open_max
-- are open; one whose checkout never opened is open for a day, as a checkout is.
CREATE FUNCTION credits.begin_top_up(
    p_user_id uuid, p_request_id uuid, p_provider text, p_package_id text, p_amount bigint, p_price_minor bigint, p_currency text,
    p_open_max integer, OUT outcome text, OUT top_up credits.top_ups
) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM credits.lock_account(p_user_id);
    SELECT * INTO top_up FROM credits.top_ups AS t WHERE t.user_id = p_user_id AND t.request_id = p_request_id;
    IF FOUND THEN
        outcome := CASE WHEN (top_up.provider, top_up.package_id) = (p_provider, p_package_id) THEN 'ok' ELSE 'reused' END;
        RETURN;
    ELSIF p_open_max <= (
        SELECT count(*) FROM credits.top_ups AS t
        WHERE t.user_id = p_user_id AND t.state = 'pending'
            AND coalesce(t.expire_time, t.create_time + interval '1 day') > clock_timestamp()
    ) THEN
        outcome := 'too_many';
        RETURN;
    END IF;
    outcome := 'ok';
    INSERT INTO credits.top_ups (user_id, request_id, provider, package_id, amount_millicredits, price_minor, currency)
    VALUES (p_user_id, p_request_id, p_provider, p_package_id, p_amount, p_price_minor, p_currency)
    RETURNING * INTO top_up;
END
$$;

-- Notes the checkout that the provider opened for a purchase; the first one stays. Shows the purchase as it stands by then.
CREATE FUNCTION credits.opened_top_up(p_top_up_id uuid, p_reference text, p_checkout_url text, p_expire_time timestamptz)
RETURNS credits.top_ups LANGUAGE plpgsql AS $$
DECLARE
    top_up credits.top_ups;
BEGIN
    UPDATE credits.top_ups AS t
    SET provider_reference = p_reference, checkout_url = p_checkout_url, expire_time = p_expire_time
    WHERE t.top_up_id = p_top_up_id AND t.provider_reference IS NULL;
    SELECT * INTO STRICT top_up FROM credits.top_ups AS t WHERE t.top_up_id = p_top_up_id;
    RETURN top_up;
END
$$;

-- Takes up to p_amount back of what is available: bought credits first, then promotional ones; what was taken. The caller holds the lock on
-- the account and has let lapse what is due.
CREATE FUNCTION credits.refund(p_top_up credits.top_ups, p_amount bigint, p_moment timestamptz) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    taken bigint;
    bought bigint;
BEGIN
    SELECT * INTO STRICT account FROM credits.accounts AS a WHERE a.user_id = p_top_up.user_id;
    taken := least(p_amount, account.available_millicredits);
    IF taken > 0 THEN
        bought := account.available_millicredits - account.promotional_millicredits;
        PERFORM credits.post(
            'refund', p_top_up.user_id, ROW(NULL, p_top_up.top_up_id, p_top_up.package_id, NULL), p_moment, -taken, 0, 'payments',
            (SELECT array_agg(ROW(lot_id, -available, 0)::credits.lot_move)
                FROM unnest(credits.draw(p_top_up.user_id, greatest(taken - bought, 0))))
        );
    END IF;
    RETURN taken;
END
$$;

-- Takes up to p_most of what refunds could not take when they came, because it was held for jobs. The caller holds the lock on the account.
CREATE OR REPLACE FUNCTION credits.collect_refunds(p_user_id uuid, p_most bigint, p_moment timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    top_up credits.top_ups;
    most bigint := p_most;
    taken bigint;
BEGIN
    FOR top_up IN
        SELECT * FROM credits.top_ups AS t
        WHERE t.user_id = p_user_id AND t.uncollected_millicredits > 0
        ORDER BY t.top_up_id
        FOR UPDATE
    LOOP
        taken := credits.refund(top_up, least(top_up.uncollected_millicredits, most), p_moment);
        EXIT WHEN taken = 0;
        UPDATE credits.top_ups AS t
        SET refunded_millicredits = t.refunded_millicredits + taken, uncollected_millicredits = t.uncollected_millicredits - taken
        WHERE t.top_up_id = top_up.top_up_id;
        most := most - taken;
    END LOOP;
END
$$;

-- Takes a notice of the provider: records it with its outcome and moves what it moves. The same notice again has the outcome of the first
-- time. `user_id`: whose purchase it is, NULL for a stranger's.
CREATE FUNCTION credits.settle_top_up(
    p_provider text, p_provider_event_id text, p_event_type text, p_kind text, p_top_up_id uuid,
    p_amount_minor bigint, p_refunded_minor bigint, p_currency text, p_event_time timestamptz,
    OUT outcome text, OUT replayed boolean, OUT user_id uuid
) LANGUAGE plpgsql AS $$
DECLARE
    account credits.accounts;
    top_up credits.top_ups;
    moment timestamptz;
    due numeric;
BEGIN
    SELECT t.user_id INTO user_id FROM credits.top_ups AS t WHERE t.top_up_id = p_top_up_id AND t.provider = p_provider;
    IF FOUND THEN
        account := credits.lock_account(user_id);
        SELECT * INTO STRICT top_up FROM credits.top_ups AS t WHERE t.top_up_id = p_top_up_id FOR UPDATE;
    END IF;

    outcome := CASE
        WHEN p_kind = 'ignored' THEN 'ignored'
        WHEN top_up.top_up_id IS NULL THEN 'unknown_top_up'
        WHEN p_kind IN ('paid', 'refunded') AND (p_amount_minor, p_currency) IS DISTINCT FROM (top_up.price_minor, top_up.currency)
            THEN 'mismatch'
        WHEN p_kind = 'refunded' AND (p_refunded_minor BETWEEN 1 AND top_up.price_minor) IS NOT TRUE THEN 'mismatch'
        WHEN p_kind = 'paid' AND top_up.pay_time IS NULL
            THEN CASE WHEN credits.fits(account, top_up.amount_millicredits) THEN 'credited' ELSE 'mismatch' END
        WHEN p_kind = 'refunded' AND p_refunded_minor > top_up.refunded_minor
            THEN CASE WHEN top_up.pay_time IS NULL THEN 'noted' ELSE 'taken_back' END
        WHEN p_kind = 'failed' AND top_up.state = 'pending' THEN 'noted'
        WHEN p_kind = 'expired' AND top_up.state IN ('pending', 'failed') THEN 'noted'
        ELSE 'stale'
    END;

    -- Waits for the same notice under way elsewhere: only the one that is recorded moves anything.
    INSERT INTO credits.payment_events (
        provider, provider_event_id, event_type, kind, top_up_id, amount_minor, refunded_minor, currency, outcome, event_time
    ) VALUES (
        p_provider, p_provider_event_id, p_event_type, p_kind, p_top_up_id, p_amount_minor, p_refunded_minor, p_currency, outcome, p_event_time
    ) ON CONFLICT DO NOTHING;
    replayed := NOT FOUND;
    IF replayed THEN
        SELECT e.outcome INTO STRICT outcome FROM credits.payment_events AS e
        WHERE e.provider = p_provider AND e.provider_event_id = p_provider_event_id;
        RETURN;
    ELSIF outcome NOT IN ('credited', 'taken_back', 'noted') THEN
        RETURN;
    END IF;

    moment := credits.moment_of(account);
    IF outcome = 'credited' THEN
        PERFORM credits.post(
            'top_up', user_id, ROW(NULL, p_top_up_id, top_up.package_id, NULL), moment, top_up.amount_millicredits, 0, 'payments'
        );
        top_up.pay_time := p_event_time;
    END IF;
    IF p_kind = 'refunded' THEN
        top_up.refunded_minor := p_refunded_minor;
    END IF;
    IF top_up.pay_time IS NOT NULL THEN
        -- Also what an earlier refund could not take.
        due := div(top_up.amount_millicredits::numeric * top_up.refunded_minor, top_up.price_minor);
        top_up.refunded_millicredits := top_up.refunded_millicredits
            + credits.refund(top_up, (due - top_up.refunded_millicredits)::bigint, moment);
        top_up.uncollected_millicredits := due - top_up.refunded_millicredits;
    END IF;
    top_up.state := CASE
        WHEN top_up.pay_time IS NULL THEN CASE WHEN p_kind IN ('failed', 'expired') THEN p_kind ELSE top_up.state END
        WHEN top_up.refunded_minor = top_up.price_minor THEN 'refunded'
        ELSE 'paid'
    END;
    UPDATE credits.top_ups AS t
    SET state = top_up.state, pay_time = top_up.pay_time, refunded_minor = top_up.refunded_minor,
        refunded_millicredits = top_up.refunded_millicredits, uncollected_millicredits = top_up.uncollected_millicredits
    WHERE t.top_up_id = p_top_up_id;
END
$$;

-- squawk-ignore renaming-object
ALTER VIEW credits.discrepancies RENAME TO ledger_discrepancies;

-- Purchases, checked against the ledger and against what the provider told.
CREATE VIEW credits.payment_discrepancies AS
SELECT 'credits given differ from what was paid for' AS problem, t.top_up_id::text AS subject,
    CASE WHEN t.pay_time IS NULL THEN 0 ELSE t.amount_millicredits END::numeric AS expected, coalesce(p.given, 0) AS actual
FROM credits.top_ups AS t
LEFT JOIN (
    SELECT v.top_up_id, sum(e.amount_millicredits) AS given
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE v.kind = 'top_up' AND e.account = 'available' GROUP BY v.top_up_id
) AS p ON p.top_up_id = t.top_up_id
WHERE CASE WHEN t.pay_time IS NULL THEN 0 ELSE t.amount_millicredits END <> coalesce(p.given, 0)
UNION ALL
SELECT 'credits taken back differ from what was recorded', t.top_up_id::text, t.refunded_millicredits, coalesce(p.taken, 0)
FROM credits.top_ups AS t
LEFT JOIN (
    SELECT v.top_up_id, -sum(e.amount_millicredits) AS taken
    FROM credits.events AS v JOIN credits.entries AS e USING (event_id)
    WHERE v.kind = 'refund' AND e.account = 'available' GROUP BY v.top_up_id
) AS p ON p.top_up_id = t.top_up_id
WHERE t.refunded_millicredits <> coalesce(p.taken, 0)
UNION ALL
SELECT 'purchase moves other accounts than its buyer''s and payments', v.event_id::text, NULL, NULL
FROM credits.events AS v
JOIN credits.top_ups AS t USING (top_up_id)
WHERE EXISTS (
    SELECT 1 FROM credits.entries AS e
    WHERE e.event_id = v.event_id AND (e.account NOT IN ('available', 'payments') OR e.user_id <> t.user_id)
)
UNION ALL
SELECT 'paid other than by one notice', t.top_up_id::text, NULL, NULL
FROM credits.top_ups AS t
LEFT JOIN (
    SELECT e.top_up_id, count(*) AS credited FROM credits.payment_events AS e WHERE e.outcome = 'credited' GROUP BY e.top_up_id
) AS n ON n.top_up_id = t.top_up_id
WHERE CASE WHEN t.pay_time IS NULL THEN 0 ELSE 1 END <> coalesce(n.credited, 0)
UNION ALL
SELECT 'refunded money differs from notices', t.top_up_id::text, NULL, NULL
FROM credits.top_ups AS t
LEFT JOIN (
    SELECT e.top_up_id, max(e.refunded_minor) AS refunded FROM credits.payment_events AS e
    WHERE e.outcome IN ('noted', 'taken_back') GROUP BY e.top_up_id
) AS n ON n.top_up_id = t.top_up_id
WHERE t.refunded_minor <> coalesce(n.refunded, 0);

-- Everything that does not add up.
CREATE VIEW credits.discrepancies AS
SELECT * FROM credits.ledger_discrepancies
UNION ALL
SELECT * FROM credits.payment_discrepancies;
