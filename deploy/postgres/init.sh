#!/bin/sh
# Run once by the postgres image, on an empty data directory: one database, and one role a service that may make its own
# schema there and cannot see into another's. The embedded stack does the same.
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set ON_ERROR_STOP=1 \
  --set gateway="$GATEWAY_DATABASE_PASSWORD" --set credits="$CREDITS_DATABASE_PASSWORD" --set jobs="$JOBS_DATABASE_PASSWORD" <<'SQL'
CREATE ROLE genmesh_gateway LOGIN PASSWORD :'gateway';
CREATE ROLE genmesh_credits LOGIN PASSWORD :'credits';
CREATE ROLE genmesh_jobs LOGIN PASSWORD :'jobs';
CREATE DATABASE genmesh;
REVOKE ALL ON DATABASE genmesh FROM PUBLIC;
GRANT CONNECT, CREATE, TEMPORARY ON DATABASE genmesh TO genmesh_gateway, genmesh_credits, genmesh_jobs;
\connect genmesh
REVOKE ALL ON SCHEMA public FROM PUBLIC;
SQL
