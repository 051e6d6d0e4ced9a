-- What promotional credits, ceilings, receipts, clawbacks and grants of plans are kept in. Columns come empty; 0005 makes their indexes
-- and checks beside running writers, 0006 the functions that fill them. Checks that are dropped here come
-- back wider.
-- squawk-ignore-file ban-drop-constraint

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

-- `promotional` is the part of `available` that lies in lots; `version` grows with each event, so that a watcher knows newer from older;
-- `event_time` is that of the newest event, before which no other can come: an account's time does not run backwards when the clock does.
ALTER TABLE credits.accounts
    ADD COLUMN promotional_millicredits bigint NOT NULL DEFAULT 0,
    ADD COLUMN version bigint NOT NULL DEFAULT 0,
    ADD COLUMN event_time timestamptz,
    ADD CONSTRAINT accounts_promotional CHECK (promotional_millicredits BETWEEN 0 AND available_millicredits) NOT VALID;

-- Credits that expire together. Guarded by the account's lock; an entry names the lot that it moves, so the entries prove these
-- balances too.
CREATE TABLE credits.lots (
    lot_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    available_millicredits bigint NOT NULL DEFAULT 0 CHECK (available_millicredits >= 0),
    reserved_millicredits bigint NOT NULL DEFAULT 0 CHECK (reserved_millicredits >= 0),
    expire_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- In the order in which they are spent.
CREATE INDEX lots_user ON credits.lots (user_id, expire_time, lot_id) WHERE available_millicredits > 0 OR reserved_millicredits > 0;
CREATE INDEX lots_due ON credits.lots (expire_time) WHERE available_millicredits > 0;

ALTER TABLE credits.reservations
    ADD COLUMN model text NOT NULL DEFAULT '',
    ADD COLUMN api_key_id uuid,
    ADD COLUMN promotional_millicredits bigint NOT NULL DEFAULT 0,
    ADD CONSTRAINT reservations_promotional CHECK (promotional_millicredits BETWEEN 0 AND amount_millicredits) NOT VALID;

-- `note`: what the owner is told beside the kind. `lines`: what a capture was for. `top_up_id`: the purchase.
ALTER TABLE credits.events
    ADD COLUMN note text,
    ADD COLUMN lines jsonb,
    ADD COLUMN top_up_id uuid,
    DROP CONSTRAINT events_kind_check,
    DROP CONSTRAINT events_of_reservation,
    ADD CONSTRAINT events_kind CHECK (kind IN (
        'grant', 'reserve', 'capture', 'release', 'expire', 'clawback', 'lapse', 'plan_grant', 'top_up', 'refund'
    )) NOT VALID,
    ADD CONSTRAINT events_of_reservation CHECK (
        (kind IN ('reserve', 'capture', 'release', 'expire')) = (reservation_id IS NOT NULL)
    ) NOT VALID,
    ADD CONSTRAINT events_of_top_up CHECK ((kind IN ('top_up', 'refund')) = (top_up_id IS NOT NULL)) NOT VALID,
    ADD CONSTRAINT events_lines CHECK (lines IS NULL OR kind = 'capture') NOT VALID;

ALTER TABLE credits.entries
    ADD COLUMN lot_id bigint,
    DROP CONSTRAINT entries_account_check,
    ADD CONSTRAINT entries_account CHECK (
        account IN ('available', 'reserved', 'grants', 'revenue', 'lapsed', 'payments')
    ) NOT VALID,
    ADD CONSTRAINT entries_lot FOREIGN KEY (lot_id) REFERENCES credits.lots (lot_id) NOT VALID,
    ADD CONSTRAINT entries_lot_owner CHECK (lot_id IS NULL OR user_id IS NOT NULL) NOT VALID;

ALTER TABLE credits.grants ADD COLUMN expire_time timestamptz;

-- Who took back what and why, and the answer that was given.
CREATE TABLE credits.clawbacks (
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

-- The months for which a user got the credits of a plan. They expire a little after their month: when the next ones come.
CREATE TABLE credits.plan_grants (
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    plan text NOT NULL,
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL,
    expire_time timestamptz NOT NULL,
    amount_millicredits bigint NOT NULL CHECK (amount_millicredits >= 1),
    event_id bigint NOT NULL UNIQUE REFERENCES credits.events (event_id),
    PRIMARY KEY (user_id, plan, start_time),
    CONSTRAINT plan_grants_time CHECK (start_time < end_time AND end_time <= expire_time)
);

CREATE TRIGGER clawbacks_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.clawbacks
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();
CREATE TRIGGER plan_grants_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credits.plan_grants
    FOR EACH STATEMENT EXECUTE FUNCTION credits.refuse_change();
REVOKE UPDATE, DELETE, TRUNCATE ON credits.clawbacks, credits.plan_grants FROM CURRENT_USER;

-- What a user, or one of the user's API keys, may spend, and what of it is spent or held on the newest day and in the newest month on
-- which anything was. Guarded by the account's lock. The nil id stands for the whole account. Counters are numeric: a month may well
-- see more than fits a balance.
CREATE TABLE credits.ceilings (
    user_id uuid NOT NULL REFERENCES credits.accounts (user_id),
    api_key_id uuid NOT NULL,
    daily_millicredits bigint CHECK (daily_millicredits >= 0),
    monthly_millicredits bigint CHECK (monthly_millicredits >= 0),
    day date NOT NULL,
    spent_today_millicredits numeric NOT NULL CHECK (spent_today_millicredits >= 0),
    month date NOT NULL CHECK (extract(day FROM month) = 1),
    spent_this_month_millicredits numeric NOT NULL CHECK (spent_this_month_millicredits >= 0),
    PRIMARY KEY (user_id, api_key_id),
    CONSTRAINT ceilings_some CHECK (num_nonnulls(daily_millicredits, monthly_millicredits) > 0)
);
