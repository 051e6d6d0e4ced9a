-- Accounts, passwords, sessions, refresh tokens.

CREATE TABLE users (
    user_id uuid PRIMARY KEY,
    email text NOT NULL CONSTRAINT users_email_key UNIQUE CONSTRAINT users_email_lower CHECK (email = lower(email)),
    display_name text NOT NULL,
    roles text[] NOT NULL,
    plan text NOT NULL CONSTRAINT users_plan CHECK (plan IN ('PLAN_FREE', 'PLAN_PRO')),
    disabled_time timestamptz,
    create_time timestamptz NOT NULL DEFAULT now()
);

-- Apart from users, so that no query for an account carries its hash.
CREATE TABLE passwords (
    user_id uuid PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    hash text NOT NULL,
    change_time timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sessions (
    session_id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES users ON DELETE CASCADE,
    create_time timestamptz NOT NULL DEFAULT now(),
    expire_time timestamptz NOT NULL,
    end_time timestamptz,
    end_reason text CONSTRAINT sessions_end_reason CHECK (end_reason IN ('signed_out', 'token_reused', 'account_disabled')),
    CONSTRAINT sessions_end CHECK ((end_time IS NULL) = (end_reason IS NULL))
);

CREATE INDEX ix_sessions_user_id ON sessions (user_id);

CREATE INDEX ix_sessions_expire_time ON sessions (expire_time);

-- Of a refresh token only its SHA-256 is known here.
CREATE TABLE refresh_tokens (
    token_hash bytea PRIMARY KEY CONSTRAINT refresh_tokens_hash_length CHECK (octet_length(token_hash) = 32),
    session_id uuid NOT NULL REFERENCES sessions ON DELETE CASCADE,
    create_time timestamptz NOT NULL DEFAULT now(),
    expire_time timestamptz NOT NULL,
    use_time timestamptz
);

CREATE INDEX ix_refresh_tokens_session_id ON refresh_tokens (session_id);

CREATE INDEX ix_refresh_tokens_expire_time ON refresh_tokens (expire_time);
