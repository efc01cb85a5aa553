-- What the server is and whether it is set as it should be.

-- name: look_at_server()^
-- Version of the server, and of pgvector: created, where, available.
SELECT
    current_setting('server_version_num')::integer AS version,
    (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS vector_version,
    (
        SELECT n.nspname
        FROM pg_extension AS x
        INNER JOIN pg_namespace AS n ON x.extnamespace = n.oid
        WHERE x.extname = 'vector'
    ) AS vector_schema,
    (SELECT default_version FROM pg_available_extensions WHERE name = 'vector') AS vector_available;

-- name: get_settings(names)
SELECT
    name,
    current_setting(name, TRUE) AS value
FROM unnest(:names::text[]) AS given (name);

-- name: get_applied_migrations()
SELECT version FROM elizasql.schema_migrations;

-- name: get_transport()$
-- Whether this connection is encrypted.
SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid();

-- name: ping()$
SELECT 1 AS pong;

-- name: introduce_types(bigints, booleans, bytes, floats, integers, intervals, jsons, smallints, texts, times, uuids, vectors)
-- Prepared on every new connection: the driver asks once for the array types that it does not know.
SELECT
    cardinality(:bigints::bigint[]) + cardinality(:booleans::boolean[]) + cardinality(:bytes::bytea[])
    + cardinality(:floats::double precision[]) + cardinality(:integers::integer[])
    + cardinality(:intervals::interval[]) + cardinality(:jsons::jsonb[]) + cardinality(:smallints::smallint[])
    + cardinality(:texts::text[]) + cardinality(:times::timestamptz[]) + cardinality(:uuids::uuid[])
    + cardinality(:vectors::vector[]) AS elements;
