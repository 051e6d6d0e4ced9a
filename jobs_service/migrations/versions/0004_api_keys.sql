-- The API key that a job's hold counts under, and the one that a retry under way holds under. NULL: its owner had signed in.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE jobs ADD COLUMN api_key_id uuid;
ALTER TABLE retries ADD COLUMN api_key_id uuid;
