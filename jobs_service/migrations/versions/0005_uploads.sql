-- Files that users bring, from their announcement to their removal.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

CREATE TABLE uploads (
    upload_id uuid PRIMARY KEY,
    owner_id uuid NOT NULL,
    -- As UploadState: 1 pending, 2 complete, 3 rejected.
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 3),
    content_type text NOT NULL,
    size_bytes bigint NOT NULL CHECK (size_bytes >= 1),
    -- Where the presigned URL writes. NULL: it writes no more, and nothing is left there.
    arrival_key text UNIQUE,
    -- The file that was checked, where no URL writes.
    object_key text UNIQUE,
    width integer NOT NULL DEFAULT 0 CHECK (width >= 0),
    height integer NOT NULL DEFAULT 0 CHECK (height >= 0),
    duration_ms bigint NOT NULL DEFAULT 0 CHECK (duration_ms >= 0),
    sha256 bytea CHECK (length(sha256) = 32),
    rejection text,
    -- The check that is under way, and until when no other may begin.
    check_id uuid,
    check_end_time timestamptz,
    url_expire_time timestamptz NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    expire_time timestamptz NOT NULL,
    CHECK (state <> 1 OR arrival_key IS NOT NULL),
    CHECK ((state = 2) = (object_key IS NOT NULL)),
    CHECK ((state = 2) = (sha256 IS NOT NULL)),
    CHECK ((state = 3) = (rejection IS NOT NULL))
);

CREATE INDEX uploads_by_owner ON uploads (owner_id, expire_time);

CREATE INDEX uploads_by_expiry ON uploads (expire_time);

CREATE INDEX uploads_arrived ON uploads (url_expire_time) WHERE state <> 1 AND arrival_key IS NOT NULL;
