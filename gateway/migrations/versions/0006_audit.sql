-- The audit trail: acts, and how they ended. Rows are added and never changed or removed.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

-- No references to accounts or keys: an entry outlives what it is about.
CREATE TABLE gateway.audit_entries (
    audit_entry_id uuid PRIMARY KEY,
    act_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor_user_id uuid,
    actor_api_key_id uuid,
    actor_service text NOT NULL,
    method text NOT NULL,
    subject text NOT NULL,
    client_address text NOT NULL,
    request_id text NOT NULL,
    details jsonb NOT NULL
);

CREATE INDEX ix_audit_entries_act_time ON gateway.audit_entries (act_time, audit_entry_id);

CREATE INDEX ix_audit_entries_actor_user_id ON gateway.audit_entries (actor_user_id, act_time, audit_entry_id);

CREATE INDEX ix_audit_entries_subject ON gateway.audit_entries (subject, act_time, audit_entry_id);

CREATE INDEX ix_audit_entries_method ON gateway.audit_entries (method, act_time, audit_entry_id);

-- Apart from the entries, so that an outcome needs no change of a row. The first one stays.
CREATE TABLE gateway.audit_outcomes (
    audit_entry_id uuid PRIMARY KEY REFERENCES gateway.audit_entries,
    finish_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    code integer NOT NULL,
    reason text NOT NULL,
    details jsonb NOT NULL
);

CREATE FUNCTION gateway.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'gateway.% is append-only', tg_table_name USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER audit_entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON gateway.audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.refuse_change();

CREATE TRIGGER audit_outcomes_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON gateway.audit_outcomes
    FOR EACH STATEMENT EXECUTE FUNCTION gateway.refuse_change();

-- Beside the triggers: the service's role gives the rights away. It keeps UPDATE on entries, which the foreign key of
-- outcomes needs to lock the row it points at.
REVOKE UPDATE, DELETE, TRUNCATE ON gateway.audit_outcomes FROM CURRENT_USER;
REVOKE DELETE, TRUNCATE ON gateway.audit_entries FROM CURRENT_USER;
