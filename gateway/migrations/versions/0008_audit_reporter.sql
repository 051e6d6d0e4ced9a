-- The service of the mesh that wrote an entry down, as its certificate says. NULL: written before this was noted, or by a gateway
-- of the release before; nobody can add an outcome to such an entry any more.

SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '60s';

ALTER TABLE gateway.audit_entries ADD COLUMN reporter text;
