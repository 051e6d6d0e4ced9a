-- API keys. Of a key only its public beginning and the SHA-256 of the whole are known here.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

CREATE TABLE gateway.api_keys (
    api_key_id uuid PRIMARY KEY,
    user_id uuid NOT NULL REFERENCES gateway.users ON DELETE CASCADE,
    display_name text NOT NULL,
    prefix text NOT NULL CONSTRAINT api_keys_prefix_key UNIQUE,
    key_hash bytea NOT NULL CONSTRAINT api_keys_hash_length CHECK (octet_length(key_hash) = 32),
    scopes text[] NOT NULL CONSTRAINT api_keys_scopes CHECK (scopes <@ ARRAY['read', 'submit', 'admin']),
    create_time timestamptz NOT NULL DEFAULT now(),
    expire_time timestamptz,
    last_use_time timestamptz,
    revoke_time timestamptz
);

CREATE INDEX ix_api_keys_user_id ON gateway.api_keys (user_id, api_key_id);
