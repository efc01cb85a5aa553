-- The resident tier: an agent's vectors of one type, held by the process and searched there (elizasql/_resident.py).
-- Written for dim_384; the loader derives the other five.
--
-- What the process holds is what a snapshot saw, and `seen` is that snapshot. A row has changed since when its xid, the
-- transaction that last wrote its vector or its scope, was not visible in it: it lies at or beyond its xmax, or is one
-- that was running then. Both are looked up in embeddings_xid_idx. (From xmin on would be simpler, but a transaction
-- that stays open, of whomever, would make all that is written beside it new again for every search.) What lies beyond
-- the xmax of the present snapshot was not written by this server, but restored into it; loads have it.
--
-- Deleted rows leave nothing behind, nor do rows of another type now: they are missing when they are to be fetched. Where
-- nothing is to be fetched, memory_rewrites tells that there may be such, or memories that were updated.
--
-- A row travels as elizasql.send_scope writes its ids, and the vector. `life` names the server's life: after a crash, a
-- failover or a restore transactions are numbered anew. A standby, which may lag, has one of its own: what is not `alive`
-- comes from another server than the tier, and is not taken.

-- name: measure_resident(agent_id, type, dimension, most)^
-- What a load begins with: `size`, how many rows there are, `most` at most, so that what is too large is not even read. The
-- width is looked at only while the agent moves to another one, when its rows are of two: no index has it, and of 100,000
-- vacuumed rows 25,000 pages are read for it in place of 83.
SELECT
    pg_current_snapshot() AS seen,
    concat_ws(
        ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
        pg_relation_filepath('elizasql.agents')
    ) AS life,
    NOT pg_is_in_recovery()
    AND NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') AS numbers_transactions,
    CASE
        WHEN EXISTS (SELECT FROM elizasql.reembeddings WHERE agent_id = :agent_id)
            THEN (
                SELECT count(*)
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND type = :type AND dimension = :dimension::smallint
                    LIMIT :most::bigint
                ) AS counted
            )
        ELSE (
            SELECT count(*)
            FROM (
                SELECT FROM elizasql.embeddings
                WHERE agent_id = :agent_id AND type = :type
                LIMIT :most::bigint
            ) AS counted
        )
    END AS size;

-- name: load_resident(agent_id, type, after, page_size)^
-- A page of the rows of a type, in the order in which they were written: those after the transaction `after`, and all
-- that the last transaction on the page wrote.
SELECT
    concat_ws(
        ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
        pg_relation_filepath('elizasql.agents')
    ) AS life,
    count(*) AS number,
    max(xid) AS last,
    string_agg(
        elizasql.send_scope(memory_id, room_id, world_id, entity_id, "unique") || vector_send(dim_384), ''
    ) AS content
FROM (
    SELECT
        memory_id,
        room_id,
        world_id,
        entity_id,
        "unique",
        xid,
        dim_384
    FROM elizasql.embeddings
    WHERE agent_id = :agent_id AND type = :type AND dimension = 384 AND xid > :after::xid8
    ORDER BY xid
    FETCH FIRST (:page_size::bigint) ROWS WITH TIES
) AS page;

-- name: read_resident_changes(agent_id, type, seen, life, most)
-- The rows of a type that have changed since `seen`, `most` at most of each transaction that ran then.
SELECT
    pg_current_snapshot() AS seen,
    :life = concat_ws(
        ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
        pg_relation_filepath('elizasql.agents')
    ) AS alive,
    count(*) AS number,
    string_agg(
        elizasql.send_scope(memory_id, room_id, world_id, entity_id, "unique") || vector_send(dim_384), ''
    ) AS content
FROM (
    SELECT
        pg_snapshot_xmax(:seen::pg_snapshot) AS earliest,
        '18446744073709551615'::xid8 AS latest
    UNION ALL
    SELECT
        running.xid AS earliest,
        running.xid AS latest
    FROM pg_snapshot_xip(:seen) AS running (xid)
) AS span
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type AND dimension = 384
            AND xid >= span.earliest AND xid <= span.latest AND xid < pg_snapshot_xmax(pg_current_snapshot())
        ORDER BY xid
        LIMIT :most::bigint
    ) AS changed;

-- name: check_resident(agent_id, type, seen, listed, life, most)
-- What has changed since `seen`, with the memories of the changed rows, a row for each (`most`: so many or more); one row
-- without where nothing has. `rewritten`: memories were updated or removed since `listed`, of which nothing else tells.
SELECT
    pg_current_snapshot() AS seen,
    coalesce((
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384
                    THEN
                        :life = concat_ws(
                            ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
                            pg_relation_filepath('elizasql.agents')
                        )
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    ), FALSE) AS alive,
    (
        SELECT count(*) > 0
        FROM (
            SELECT
                pg_snapshot_xmax(:listed::pg_snapshot) AS earliest,
                '18446744073709551615'::xid8 AS latest
            UNION ALL
            SELECT
                running.xid AS earliest,
                running.xid AS latest
            FROM pg_snapshot_xip(:listed) AS running (xid)
        ) AS span
        CROSS JOIN
            LATERAL (
                SELECT FROM elizasql.memory_rewrites
                WHERE
                    agent_id = :agent_id AND type IN (:type, '')
                    AND xid >= span.earliest AND xid <= span.latest AND xid < pg_snapshot_xmax(pg_current_snapshot())
                LIMIT 1
            ) AS noted
    ) AS rewritten,
    changed.sent AS changed,
    m.version,
    m.created_at,
    m.content,
    m.metadata
FROM (VALUES (TRUE)) AS news (come)
LEFT JOIN LATERAL (
    SELECT
        memory_id,
        elizasql.send_scope(memory_id, room_id, world_id, entity_id, "unique") || vector_send(dim_384) AS sent
    FROM (
        SELECT
            pg_snapshot_xmax(:seen::pg_snapshot) AS earliest,
            '18446744073709551615'::xid8 AS latest
        UNION ALL
        SELECT
            running.xid AS earliest,
            running.xid AS latest
        FROM pg_snapshot_xip(:seen) AS running (xid)
    ) AS span
    CROSS JOIN
        LATERAL (
            SELECT * FROM elizasql.embeddings
            WHERE
                agent_id = :agent_id AND type = :type AND dimension = 384
                AND xid >= span.earliest AND xid <= span.latest AND xid < pg_snapshot_xmax(pg_current_snapshot())
            ORDER BY xid
            LIMIT :most::bigint
        ) AS written
) AS changed ON TRUE
LEFT JOIN LATERAL (
    SELECT
        xmin::text::bigint AS version,
        created_at,
        jsonb_send(content) AS content,
        jsonb_send(metadata) AS metadata
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = changed.memory_id
    LIMIT 1
) AS m ON TRUE;

-- name: list_resident(agent_id, type, dimension, life)^
-- Which memories of a type there are, and which version of each: its id and, in eight bytes, its xmin; 0 where only the
-- vector is there yet, as while tables are replicated one by one. `size`: the bytes in which the server keeps the contents.
SELECT
    pg_current_snapshot() AS seen,
    :life = concat_ws(
        ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
        pg_relation_filepath('elizasql.agents')
    ) AS alive,
    coalesce(sum(m.size), 0)::bigint AS size,
    string_agg(uuid_send(e.memory_id) || int8send(coalesce(m.version, 0)), '') AS content
FROM elizasql.embeddings AS e
LEFT JOIN LATERAL (
    SELECT
        xmin::text::bigint AS version,
        pg_column_size(content) + pg_column_size(metadata) AS size
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = e.memory_id
    LIMIT 1
) AS m ON TRUE
WHERE e.agent_id = :agent_id AND e.type = :type AND e.dimension = :dimension::smallint;

-- name: read_resident_contents(agent_id, type, dimension, ids, life)
-- What a process holds of memories beside their vectors, as the server sends it: decoded when it is given out. Only of
-- those that have the type and a vector still: one that lost them before the list was made nothing else tells of. Where
-- there is none, one row without.
SELECT
    (
        SELECT
            :life = concat_ws(
                ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
                pg_relation_filepath('elizasql.agents')
            )
    ) AS alive,
    found.id,
    found.version,
    found.created_at,
    found.content,
    found.metadata
FROM (VALUES (TRUE)) AS answer (given)
LEFT JOIN (
    SELECT m.*
    FROM unnest(:ids::uuid[]) AS wanted (id)
    CROSS JOIN
        LATERAL (
            SELECT FROM elizasql.embeddings
            WHERE
                agent_id = :agent_id AND memory_id = wanted.id
                AND type = :type AND dimension = :dimension::smallint
            LIMIT 1
        ) AS e
    CROSS JOIN
        LATERAL (
            SELECT
                id,
                xmin::text::bigint AS version,
                created_at,
                jsonb_send(content) AS content,
                jsonb_send(metadata) AS metadata
            FROM elizasql.memories
            WHERE agent_id = :agent_id AND id = wanted.id
            LIMIT 1
        ) AS m
) AS found ON TRUE;

-- name: fetch_resident(embedding, agent_id, type, ids, seen, life, room_id, world_id, entity_id, only_unique, threshold, count, most, include_embedding)
-- The nearest memories among those that the process found and those that have changed since `seen`, ranked exactly, all
-- filters applied to the rows as they are now. The last row tells about the rest: the snapshot of all this, whether the
-- server lives the same life, how many rows have changed (`most`: so many or more), these rows, and which ids are gone.
-- Each id is looked up by the whole primary key: `memory_id = ANY(...)` let a generic plan, made where agents are small,
-- read all rows of the agent instead.
WITH changed AS MATERIALIZED (
    SELECT
        memory_id,
        elizasql.send_scope(memory_id, room_id, world_id, entity_id, "unique") || vector_send(dim_384) AS content
    FROM (
        SELECT
            pg_snapshot_xmax(:seen::pg_snapshot) AS earliest,
            '18446744073709551615'::xid8 AS latest
        UNION ALL
        SELECT
            running.xid AS earliest,
            running.xid AS latest
        FROM pg_snapshot_xip(:seen) AS running (xid)
    ) AS span
    CROSS JOIN
        LATERAL (
            SELECT * FROM elizasql.embeddings
            WHERE
                agent_id = :agent_id AND type = :type AND dimension = 384
                AND xid >= span.earliest AND xid <= span.latest AND xid < pg_snapshot_xmax(pg_current_snapshot())
            ORDER BY xid
            LIMIT :most::bigint
        ) AS written
),

known AS MATERIALIZED (
    SELECT
        e.memory_id,
        e.room_id,
        e.world_id,
        e.entity_id,
        e."unique",
        e.dim_384 <=> :embedding AS distance,
        CASE WHEN :include_embedding THEN e.dim_384 END AS embedding
    FROM
        unnest(
            :ids::uuid[]
            || ARRAY(SELECT changed.memory_id FROM changed WHERE changed.memory_id <> ALL(:ids))
        ) AS wanted (id)
    CROSS JOIN
        LATERAL (
            SELECT * FROM elizasql.embeddings
            WHERE agent_id = :agent_id AND memory_id = wanted.id AND dimension = 384
            LIMIT 1
        ) AS e
    WHERE
        e.type = :type
        AND (
            SELECT
                CASE
                    WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                    ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
                END
            FROM elizasql.agents AS a
            WHERE a.id = :agent_id
        )
),

best AS (
    SELECT
        memory_id,
        distance,
        embedding
    FROM known
    WHERE
        (:room_id::uuid IS NULL OR room_id = :room_id)
        AND (:world_id::uuid IS NULL OR world_id = :world_id)
        AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
        AND ("unique" OR NOT :only_unique)
        AND (:threshold::double precision IS NULL OR 1 - distance >= :threshold)
    ORDER BY distance, memory_id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    best.embedding,
    1 - best.distance AS similarity,
    best.distance,
    NULL::pg_snapshot AS seen,
    NULL::boolean AS alive,
    NULL::bigint AS number,
    NULL::bytea AS changed,
    NULL::uuid[] AS gone
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.memory_id
        LIMIT 1
    ) AS m
UNION ALL
SELECT
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    pg_current_snapshot(),
    :life = concat_ws(
        ' ', pg_postmaster_start_time(), pg_stat_get_bgwriter_stat_reset_time(),
        pg_relation_filepath('elizasql.agents')
    ),
    (SELECT count(*) FROM changed),
    (SELECT string_agg(changed.content, '') FROM changed),
    CASE
        WHEN (SELECT count(*) FROM known) < cardinality(:ids) + (SELECT count(*) FROM changed)
            THEN ARRAY(
                SELECT given.id FROM unnest(:ids) AS given (id)
                WHERE NOT EXISTS (SELECT FROM known WHERE known.memory_id = given.id)
            )
    END
ORDER BY distance, id;
