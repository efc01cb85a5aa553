-- What the server is and whether it is set as it should be.

-- name: look_at_server()^
-- Version of the server, and of pgvector: created, where, available; indexes of ours that the server does not use; the
-- encoding; the path to the extension, or to where it can be made, if the session's does not lead there, or past other
-- things of the same names; whether the role may use what is there; whether triggers fire for what the session writes.
SELECT
    current_setting('server_version_num')::integer AS version,
    x.extversion AS vector_version,
    n.nspname AS vector_schema,
    (SELECT default_version FROM pg_catalog.pg_available_extensions WHERE name = 'vector') AS vector_available,
    ARRAY(
        SELECT c.relname::text
        FROM pg_catalog.pg_index AS i
        INNER JOIN pg_catalog.pg_class AS c ON i.indexrelid = c.oid
        INNER JOIN pg_catalog.pg_namespace AS n ON c.relnamespace = n.oid
        WHERE n.nspname = 'elizasql' AND NOT i.indisvalid
        ORDER BY c.relname
    ) AS invalid_indexes,
    current_setting('server_encoding') AS encoding,
    CASE
        WHEN n.nspname IS NULL AND current_schema IS NULL THEN 'public'
        -- What comes before the extension may have a name of its own for a type, a function or an operator of ours: a
        -- table called vector is a type, too.
        WHEN
            'pg_catalog' = ANY((current_schemas(FALSE))[2:])
            OR EXISTS (
                SELECT FROM pg_catalog.pg_depend AS d
                WHERE
                    d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.refobjid = x.oid AND d.deptype = 'e'
                    AND NOT CASE d.classid
                        WHEN 'pg_catalog.pg_type'::regclass THEN pg_type_is_visible(d.objid)
                        WHEN 'pg_catalog.pg_proc'::regclass THEN pg_function_is_visible(d.objid)
                        WHEN 'pg_catalog.pg_operator'::regclass THEN pg_operator_is_visible(d.objid)
                        WHEN 'pg_catalog.pg_opclass'::regclass THEN pg_opclass_is_visible(d.objid)
                        ELSE TRUE
                    END
            )
            THEN quote_ident(n.nspname)
    END AS vector_path,
    coalesce(has_schema_privilege(n.oid, 'USAGE'), TRUE) AS may_use_vector,
    current_setting('session_replication_role') <> 'replica' AS fires_triggers
FROM (SELECT) AS one
LEFT JOIN pg_catalog.pg_extension AS x ON x.extname = 'vector'
LEFT JOIN pg_catalog.pg_namespace AS n ON x.extnamespace = n.oid;

-- name: get_settings(names)
SELECT
    name,
    current_setting(name, TRUE) AS value
FROM unnest(:names::text[]) AS given (name);

-- name: get_applied_migrations()
SELECT version FROM elizasql.schema_migrations;

-- name: ping()$
SELECT 1 AS pong;

-- name: begin_transaction()!
BEGIN;

-- name: commit_transaction()!
COMMIT;

-- name: roll_back_transaction()!
ROLLBACK;

-- name: begin_savepoint()!
-- "nested" stands for a name of its own for each savepoint of a transaction: of one that was cancelled while it began
-- nobody knows whether it is there, and no other may be taken for it. The linter knows no savepoints.
-- noqa: disable=PRS
SAVEPOINT nested;

-- name: release_savepoint()!
RELEASE SAVEPOINT nested;

-- name: roll_back_savepoint()!
-- It is still there afterwards, until it is released.
ROLLBACK TO SAVEPOINT nested;

-- name: get_transaction_id()^
-- noqa: enable=PRS
-- The transaction's id, NULL when it has written nothing, and the server's life that it belongs to: the timeline, and
-- when statistics began, which is anew with every recovery from a crash.
SELECT
    pg_current_xact_id_if_assigned()::text AS id,
    CASE
        WHEN NOT pg_is_in_recovery()
            THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) || pg_stat_get_bgwriter_stat_reset_time()
    END AS timeline;

-- name: take_mark(mark)$
-- Whether nobody else in this database has the mark, which is then this transaction's to its end.
SELECT pg_try_advisory_xact_lock(:mark::bigint) AS taken;

-- name: lift_limits()
-- To the end of the transaction nothing ends what takes long; through a pooler, too, which takes no settings of a session.
SELECT set_config(name, '0', TRUE) AS lifted
FROM pg_catalog.pg_settings
WHERE name IN ('statement_timeout', 'transaction_timeout');

-- name: get_transaction_status(id, timeline)$
-- What became of a transaction: committed, aborted, in progress; NULL when it is long ago, or on another timeline, where
-- the id means nothing.
-- A crash takes along ids that were not written down, and the server gives them out again: after one "committed" may be
-- about another transaction, and everything else says that this one was not kept. But for "in progress": statistics that
-- are reset look like a crash, and then it is about this one. What is not given out yet is found by taking the next id.
SELECT
    CASE
        WHEN
            pg_is_in_recovery()
            OR left(pg_walfile_name(pg_current_wal_lsn()), 8) IS DISTINCT FROM left(:timeline::text, 8)
            THEN NULL
        WHEN substr(:timeline::text, 9) = pg_stat_get_bgwriter_stat_reset_time()::text
            THEN pg_xact_status(:id::text::xid8)
        WHEN :id::text::xid8 >= pg_current_xact_id() THEN 'aborted'
        ELSE nullif(pg_xact_status(:id::text::xid8), 'committed')
    END AS status;

-- name: introduce_types(bigints, booleans, bytes, floats, integers, intervals, jsons, smallints, texts, times, uuids, vectors)
-- Prepared on every new connection: the driver asks once for the array types that it does not know.
SELECT
    cardinality(:bigints::bigint[]) + cardinality(:booleans::boolean[]) + cardinality(:bytes::bytea[])
    + cardinality(:floats::double precision[]) + cardinality(:integers::integer[])
    + cardinality(:intervals::interval[]) + cardinality(:jsons::jsonb[]) + cardinality(:smallints::smallint[])
    + cardinality(:texts::text[]) + cardinality(:times::timestamptz[]) + cardinality(:uuids::uuid[])
    + cardinality(:vectors::vector[]) AS elements;
