-- Who somebody is at other identity providers, and where sessions began.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

-- One identity of an issuer belongs to one account, and an account has one of each issuer at most.
CREATE TABLE gateway.identities (
    issuer text NOT NULL,
    subject text NOT NULL,
    user_id uuid NOT NULL REFERENCES gateway.users ON DELETE CASCADE,
    create_time timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT identities_pkey PRIMARY KEY (issuer, subject),
    CONSTRAINT identities_user_id_issuer_key UNIQUE (user_id, issuer)
);

-- From where an account has been signed in to: what strangers do does not stop its owner there. Empty: not known.
ALTER TABLE gateway.sessions ADD COLUMN client_network text NOT NULL DEFAULT '';
