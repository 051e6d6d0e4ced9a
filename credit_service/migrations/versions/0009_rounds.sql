-- Work that the replicas of the service share, one of them at a time: who does it now, and when the next may begin. A holder that is
-- done leaves; one that died is succeeded once its time is over.

CREATE TABLE credits.rounds (
    name text PRIMARY KEY,
    holder uuid,
    free_time timestamptz NOT NULL
);
