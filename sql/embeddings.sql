-- Embeddings: search by meaning, the dimension lock, the index. Written for dim_384; the loader derives the other five,
-- and from the search of a room those of an entity and of a world.
--
-- Two tiers. A new vector has indexed = false: it stands in the tail, which a search scans exactly, so that writes never
-- wait for HNSW (0.3 ms a row without, 1.3-2.4 ms with). The indexer moves the tail over. A search takes HNSW's
-- candidates and the whole tail, and ranks both by the exact distance; equal distances are ordered by id.
--
-- The winners are looked up by LATERAL ... LIMIT 1: a plain join may be planned as a hash of all the agent's memories.
--
-- ORDER BY column <=> value, ascending, is the only form that HNSW serves. The threshold is applied after the top: in the
-- WHERE it would make the index walk everything.
--
-- Exact or HNSW. HNSW under a selective filter loses rows (recall 0.41 for a room of 37 rows among 100,000). So the
-- statements measure the scope first, which costs 0.1 us a row, no further than decides: up to 2,000 rows, or up to
-- 20,000 that are less than 0.3 of the graph, are scanned exactly through the b-tree. The size of the graph is its
-- partition's, found by the type's oldest row: without an order the generic plan made a bitmap of all the agent's rows
-- for it, 5 ms for 100,000.
-- One that was never counted, -1, is taken for 100,000: as a small one it would be asked for any scope of 2,001.
-- Of what has hardly any in the graph, as a type whose rows wait in the tail, HNSW would walk all the others for nothing:
-- up to 2,000 rows that are indexed do not count as large either. Where little waits that follows from both counts; else
-- those that are indexed are counted, which no index alone can tell, 0.3 us a row.
-- Whatever was chosen, when HNSW yields fewer rows than asked for, the same statement scans the scope exactly: never
-- fewer than min(count, matches) rows. Those of the tail do not count for that: they may make up the number, and be
-- further than what HNSW has not reached. Who measured a moment ago says what was chosen then, by_hnsw: 1.4 ms instead of
-- 3.0 for a world of 74,000 rows.
--
-- HNSW keeps as many candidates as the search asks for, ef_search, and more where the graph hides more: times size^0.25
-- above 100,000 rows, 1.8 times as many for a million. They are set where the choice is made, which is before the index is
-- opened, and to the transaction's end (2 us); known_ef is what was found when the scope was measured.
--
-- While an agent moves to another width there are rows of both. A search reads those of its own, and is refused where
-- that is not the width in force: one look at the agent's row, in the snapshot of the search. An agent that has no width
-- has no rows either, and nothing to refuse. Rows of both widths are counted, where only the order of magnitude is asked
-- for.

-- name: search_memories(embedding, agent_id, type, by_hnsw, known_ef, ef_search, only_unique, threshold, count, candidates, include_embedding)
-- The nearest memories of a type, over everything that the agent has; and whether HNSW was the way.
WITH graph AS MATERIALIZED (
    SELECT CASE WHEN reltuples < 0 THEN 100000 ELSE reltuples END AS size FROM pg_class
    WHERE oid = (
        SELECT one.tableoid FROM elizasql.embeddings AS one
        WHERE one.agent_id = :agent_id AND one.type = :type
        ORDER BY one.xid
        LIMIT 1
    )
),

scope AS MATERIALIZED (
    SELECT count(*) AS size
    FROM (
        SELECT FROM elizasql.embeddings
        WHERE agent_id = :agent_id AND type = :type
        LIMIT (SELECT least(20001, greatest(2001, ceil(0.3 * graph.size)))::bigint FROM graph)
    ) AS counted
),

placed AS MATERIALIZED (
    SELECT
        CASE
            WHEN (
                SELECT count(*)
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND type = :type AND NOT indexed
                    LIMIT 501
                ) AS waiting
            ) <= least(500, scope.size - 2001) THEN TRUE
            ELSE (
                SELECT count(*) > 2000
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND type = :type AND indexed
                    LIMIT 2001
                ) AS counted
            )
        END AS many
    FROM scope
),

choice AS MATERIALIZED (
    SELECT
        coalesce(:by_hnsw::boolean, (
            SELECT
                (
                    scope.size > 20000
                    OR (scope.size > 2000 AND scope.size >= 0.3 * (SELECT graph.size FROM graph))
                )
                AND (SELECT placed.many FROM placed)
            FROM scope
        )) AS by_hnsw,
        CASE
            WHEN :by_hnsw IS NOT NULL THEN :known_ef::text
            WHEN (SELECT scope.size FROM scope) > 2000 THEN (
                SELECT least(1000, round(:ef_search::int * power(greatest(graph.size / 100000, 1), 0.25)))::text
                FROM graph
            )
        END AS ef
),

nearest AS MATERIALIZED (
    SELECT
        memory_id,
        dim_384 <=> :embedding AS distance
    FROM (
        SELECT
            memory_id,
            dim_384
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND indexed
            AND (SELECT choice.by_hnsw AND set_config('hnsw.ef_search', choice.ef, TRUE) <> '' FROM choice)
        ORDER BY dim_384::halfvec(384) <=> :embedding::vector::halfvec(384)
        LIMIT :candidates::bigint
    ) AS by_index
),

enough AS MATERIALIZED (
    SELECT count(*) >= :count::bigint AS yes FROM nearest
),

best AS (
    SELECT
        memory_id,
        distance
    FROM (
        SELECT
            memory_id,
            distance
        FROM nearest
        WHERE (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT indexed
            AND (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
    ) AS ranked
    ORDER BY distance, memory_id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity,
    (SELECT choice.by_hnsw FROM choice) AS by_hnsw,
    (SELECT choice.ef FROM choice) AS ef
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.memory_id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: search_memories_by_hnsw(embedding, agent_id, type, known_ef, only_unique, threshold, count, candidates, include_embedding)
-- As search_memories, for a scope that was found to be large and dense a moment ago: not measured again.
WITH nearest AS MATERIALIZED (
    SELECT
        memory_id,
        dim_384 <=> :embedding AS distance
    FROM (
        SELECT
            memory_id,
            dim_384
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND indexed
            AND (SELECT set_config('hnsw.ef_search', :known_ef, TRUE) <> '')
        ORDER BY dim_384::halfvec(384) <=> :embedding::vector::halfvec(384)
        LIMIT :candidates::bigint
    ) AS by_index
),

enough AS MATERIALIZED (
    SELECT count(*) >= :count::bigint AS yes FROM nearest
),

best AS (
    SELECT
        memory_id,
        distance
    FROM (
        SELECT
            memory_id,
            distance
        FROM nearest
        WHERE (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT indexed
            AND (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
    ) AS ranked
    ORDER BY distance, memory_id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.memory_id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: search_memories_of_room(embedding, agent_id, type, room_id, by_hnsw, known_ef, ef_search, only_unique, threshold, count, candidates, include_embedding)
-- As search_memories, in one room. Also for: entity, world.
WITH graph AS MATERIALIZED (
    SELECT CASE WHEN reltuples < 0 THEN 100000 ELSE reltuples END AS size FROM pg_class
    WHERE oid = (
        SELECT one.tableoid FROM elizasql.embeddings AS one
        WHERE one.agent_id = :agent_id AND one.type = :type
        ORDER BY one.xid
        LIMIT 1
    )
),

scope AS MATERIALIZED (
    SELECT count(*) AS size
    FROM (
        SELECT FROM elizasql.embeddings
        WHERE agent_id = :agent_id AND room_id = :room_id AND type = :type
        LIMIT (SELECT least(20001, greatest(2001, ceil(0.3 * graph.size)))::bigint FROM graph)
    ) AS counted
),

placed AS MATERIALIZED (
    SELECT
        CASE
            WHEN (
                SELECT count(*)
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND type = :type AND NOT indexed
                    LIMIT 501
                ) AS waiting
            ) <= least(500, scope.size - 2001) THEN TRUE
            ELSE (
                SELECT count(*) > 2000
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND room_id = :room_id AND type = :type AND indexed
                    LIMIT 2001
                ) AS counted
            )
        END AS many
    FROM scope
),

choice AS MATERIALIZED (
    SELECT
        coalesce(:by_hnsw::boolean, (
            SELECT
                (
                    scope.size > 20000
                    OR (scope.size > 2000 AND scope.size >= 0.3 * (SELECT graph.size FROM graph))
                )
                AND (SELECT placed.many FROM placed)
            FROM scope
        )) AS by_hnsw,
        CASE
            WHEN :by_hnsw IS NOT NULL THEN :known_ef::text
            WHEN (SELECT scope.size FROM scope) > 2000 THEN (
                SELECT least(1000, round(:ef_search::int * power(greatest(graph.size / 100000, 1), 0.25)))::text
                FROM graph
            )
        END AS ef
),

nearest AS MATERIALIZED (
    SELECT
        memory_id,
        dim_384 <=> :embedding AS distance
    FROM (
        SELECT
            memory_id,
            dim_384
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND indexed
            AND (SELECT choice.by_hnsw AND set_config('hnsw.ef_search', choice.ef, TRUE) <> '' FROM choice)
        ORDER BY dim_384::halfvec(384) <=> :embedding::vector::halfvec(384)
        LIMIT :candidates::bigint
    ) AS by_index
),

enough AS MATERIALIZED (
    SELECT count(*) >= :count::bigint AS yes FROM nearest
),

best AS (
    SELECT
        memory_id,
        distance
    FROM (
        SELECT
            memory_id,
            distance
        FROM nearest
        WHERE (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT indexed
            AND (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND dimension = 384
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
    ) AS ranked
    ORDER BY distance, memory_id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity,
    (SELECT choice.by_hnsw FROM choice) AS by_hnsw,
    (SELECT choice.ef FROM choice) AS ef
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.memory_id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: search_memories_of_several(embedding, agent_id, type, room_id, entity_id, world_id, by_hnsw, known_ef, ef_search, only_unique, threshold, count, candidates, include_embedding)
-- As search_memories, for what is in two or three of a room, an entity and a world. Each of them is measured alone, since
-- no index counts what they share; the smallest decides, and is the one that an exact search goes through.
WITH graph AS MATERIALIZED (
    SELECT CASE WHEN reltuples < 0 THEN 100000 ELSE reltuples END AS size FROM pg_class
    WHERE oid = (
        SELECT one.tableoid FROM elizasql.embeddings AS one
        WHERE one.agent_id = :agent_id AND one.type = :type
        ORDER BY one.xid
        LIMIT 1
    )
),

sizes AS MATERIALIZED (
    SELECT
        CASE WHEN :room_id::uuid IS NOT NULL THEN (
            SELECT count(*)
            FROM (
                SELECT FROM elizasql.embeddings
                WHERE agent_id = :agent_id AND room_id = :room_id AND type = :type
                LIMIT (SELECT least(20001, greatest(2001, ceil(0.3 * graph.size)))::bigint FROM graph)
            ) AS counted
        ) END AS room,
        CASE WHEN :entity_id::uuid IS NOT NULL THEN (
            SELECT count(*)
            FROM (
                SELECT FROM elizasql.embeddings
                WHERE agent_id = :agent_id AND entity_id = :entity_id AND type = :type
                LIMIT (SELECT least(20001, greatest(2001, ceil(0.3 * graph.size)))::bigint FROM graph)
            ) AS counted
        ) END AS entity,
        CASE WHEN :world_id::uuid IS NOT NULL THEN (
            SELECT count(*)
            FROM (
                SELECT FROM elizasql.embeddings
                WHERE agent_id = :agent_id AND world_id = :world_id AND type = :type
                LIMIT (SELECT least(20001, greatest(2001, ceil(0.3 * graph.size)))::bigint FROM graph)
            ) AS counted
        ) END AS world
),

scope AS MATERIALIZED (
    SELECT least(room, entity, world) AS size FROM sizes
),

narrowest AS MATERIALIZED (
    SELECT
        CASE scope.size
            WHEN sizes.room THEN 'room'
            WHEN sizes.entity THEN 'entity'
            ELSE 'world'
        END AS name
    FROM scope
    CROSS JOIN sizes
),

placed AS MATERIALIZED (
    SELECT
        CASE
            WHEN (
                SELECT count(*)
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND type = :type AND NOT indexed
                    LIMIT 501
                ) AS waiting
            ) <= least(500, scope.size - 2001) THEN TRUE
            WHEN narrowest.name = 'room'
                THEN (
                    SELECT count(*) > 2000
                    FROM (
                        SELECT FROM elizasql.embeddings
                        WHERE agent_id = :agent_id AND room_id = :room_id AND type = :type AND indexed
                        LIMIT 2001
                    ) AS counted
                )
            WHEN narrowest.name = 'entity'
                THEN (
                    SELECT count(*) > 2000
                    FROM (
                        SELECT FROM elizasql.embeddings
                        WHERE agent_id = :agent_id AND entity_id = :entity_id AND type = :type AND indexed
                        LIMIT 2001
                    ) AS counted
                )
            WHEN narrowest.name = 'world' THEN (
                SELECT count(*) > 2000
                FROM (
                    SELECT FROM elizasql.embeddings
                    WHERE agent_id = :agent_id AND world_id = :world_id AND type = :type AND indexed
                    LIMIT 2001
                ) AS counted
            )
        END AS many
    FROM scope
    CROSS JOIN narrowest
),

choice AS MATERIALIZED (
    SELECT
        coalesce(:by_hnsw::boolean, (
            SELECT
                (
                    scope.size > 20000
                    OR (scope.size > 2000 AND scope.size >= 0.3 * (SELECT graph.size FROM graph))
                )
                AND (SELECT placed.many FROM placed)
            FROM scope
        )) AS by_hnsw,
        CASE
            WHEN :by_hnsw IS NOT NULL THEN :known_ef::text
            WHEN (SELECT scope.size FROM scope) > 2000 THEN (
                SELECT least(1000, round(:ef_search::int * power(greatest(graph.size / 100000, 1), 0.25)))::text
                FROM graph
            )
        END AS ef
),

nearest AS MATERIALIZED (
    SELECT
        memory_id,
        dim_384 <=> :embedding AS distance
    FROM (
        SELECT
            memory_id,
            dim_384
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND (:room_id::uuid IS NULL OR room_id = :room_id)
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND ("unique" OR NOT :only_unique)
            AND indexed
            AND (SELECT choice.by_hnsw AND set_config('hnsw.ef_search', choice.ef, TRUE) <> '' FROM choice)
        ORDER BY dim_384::halfvec(384) <=> :embedding::vector::halfvec(384)
        LIMIT :candidates::bigint
    ) AS by_index
),

enough AS MATERIALIZED (
    SELECT count(*) >= :count::bigint AS yes FROM nearest
),

best AS (
    SELECT
        memory_id,
        distance
    FROM (
        SELECT
            memory_id,
            distance
        FROM nearest
        WHERE (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND type = :type
            AND dimension = 384
            AND (:room_id::uuid IS NULL OR room_id = :room_id)
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND ("unique" OR NOT :only_unique)
            AND NOT indexed
            AND (SELECT enough.yes FROM enough)
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND dimension = 384
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
            AND (SELECT narrowest.name FROM narrowest) = 'room'
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND entity_id = :entity_id AND type = :type
            AND dimension = 384
            AND (:room_id::uuid IS NULL OR room_id = :room_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
            AND (SELECT narrowest.name FROM narrowest) = 'entity'
        UNION ALL
        SELECT
            memory_id,
            dim_384 <=> :embedding AS distance
        FROM elizasql.embeddings
        WHERE
            agent_id = :agent_id AND world_id = :world_id AND type = :type
            AND dimension = 384
            AND (:room_id::uuid IS NULL OR room_id = :room_id)
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND ("unique" OR NOT :only_unique)
            AND NOT (SELECT enough.yes FROM enough)
            AND (SELECT narrowest.name FROM narrowest) = 'world'
    ) AS ranked
    ORDER BY distance, memory_id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity,
    (SELECT choice.by_hnsw FROM choice) AS by_hnsw,
    (SELECT choice.ef FROM choice) AS ef
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.memory_id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: search_memories_where(embedding, agent_id, type, entity_id, world_id, only_unique, start_time, end_time, metadata, threshold, count, include_embedding)
-- The nearest of a type that pass what only the memory itself tells: its time and its metadata. Every one that passes is
-- compared, found by the index of the scope, in which a range of time is a part. greatest(): as the index has it.
WITH best AS MATERIALIZED (
    SELECT
        passing.id,
        of_memory.distance
    FROM (
        SELECT id FROM elizasql.memories
        WHERE
            agent_id = :agent_id AND type = :type
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND greatest(created_at) >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
            AND greatest(created_at) <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
            AND ("unique" OR NOT :only_unique)
            AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    ) AS passing
    CROSS JOIN
        LATERAL (
            SELECT e.dim_384 <=> :embedding AS distance FROM elizasql.embeddings AS e
            WHERE e.agent_id = :agent_id AND e.memory_id = passing.id AND e.dimension = 384
            LIMIT 1
        ) AS of_memory
    ORDER BY of_memory.distance, passing.id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: search_memories_where_of_room(embedding, agent_id, type, room_id, entity_id, world_id, only_unique, start_time, end_time, metadata, threshold, count, include_embedding)
-- As search_memories_where, in one room. Also for: entity, world.
WITH best AS MATERIALIZED (
    SELECT
        passing.id,
        of_memory.distance
    FROM (
        SELECT id FROM elizasql.memories
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND created_at >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
            AND created_at <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
            AND ("unique" OR NOT :only_unique)
            AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    ) AS passing
    CROSS JOIN
        LATERAL (
            SELECT e.dim_384 <=> :embedding AS distance FROM elizasql.embeddings AS e
            WHERE e.agent_id = :agent_id AND e.memory_id = passing.id AND e.dimension = 384
            LIMIT 1
        ) AS of_memory
    ORDER BY of_memory.distance, passing.id
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT e.dim_384 FROM elizasql.embeddings AS e
        WHERE e.agent_id = :agent_id AND e.memory_id = m.id AND e.dimension = 384
    ) END AS embedding,
    1 - best.distance AS similarity
FROM best
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = best.id
        LIMIT 1
    ) AS m
WHERE
    (
        SELECT
            CASE
                WHEN coalesce(a.embedding_dimension, 384) = 384 THEN TRUE
                ELSE elizasql.refuse_dimension(a.id, a.embedding_dimension, 384)
            END
        FROM elizasql.agents AS a
        WHERE a.id = :agent_id
    )
    AND (:threshold::double precision IS NULL OR 1 - best.distance >= :threshold)
ORDER BY best.distance, m.id;

-- name: lock_embedding_dimension(agent_id, dimension)$
-- Sets the agent's dimension when it has none, and gives the one that is then in force. One that is set is only read, and
-- so waits for nobody. Of concurrent calls that find none the first wins and the others, which wait for its row lock, see
-- its value.
WITH found AS MATERIALIZED (
    SELECT embedding_dimension FROM elizasql.agents
    WHERE id = :agent_id AND embedding_dimension IS NOT NULL
),

locked AS (
    UPDATE elizasql.agents
    SET embedding_dimension = coalesce(embedding_dimension, :dimension::smallint)
    WHERE id = :agent_id AND NOT EXISTS (SELECT FROM found)
    RETURNING embedding_dimension
)

SELECT embedding_dimension FROM found
UNION ALL
SELECT embedding_dimension FROM locked;

-- name: get_embedding_dimension(agent_id)$
SELECT embedding_dimension FROM elizasql.agents WHERE id = :agent_id;

-- name: index_embeddings(agent_id, batch_size, waits)$
-- Moves up to batch_size vectors of the tail into the HNSW index, fewer where that takes long; gives their number. Several may
-- run at once. waits: for the end of what locks writers out, such as the build of the index; else null.
SELECT elizasql.index_embeddings(:agent_id, NULL, :batch_size, :waits);

-- name: count_unindexed_embeddings(agent_id)$
SELECT count(*) FROM elizasql.embeddings WHERE agent_id = :agent_id AND NOT indexed;

-- name: refresh_statistics(agent_id, waits)!
SELECT elizasql.refresh_statistics(:agent_id, :waits);

-- name: drop_index(agent_id, coming)$
-- Drops the HNSW index of the agent's partition when so many vectors come that a new one will be cheaper than feeding it
-- row by row; NULL: in any case. Gives whether there is none now.
SELECT elizasql.drop_index(:agent_id, :coming);

-- name: build_index(agent_id, waits)$
-- Builds the HNSW indexes that the agent's partition lacks, with the tail in them; gives the number of vectors moved. waits:
-- for others who build them, or vacuum by hand; else null.
SELECT elizasql.build_index(:agent_id, :waits);

-- name: find_lost_index(agent_id)
-- The size of the agent's partition, and the width, for each HNSW index that the partition lacks and this role may make.
SELECT
    pg_relation_size(part.oid) AS size,
    lost.dimension
FROM pg_class AS part
CROSS JOIN unnest(elizasql.lost_indexes(:agent_id)) AS lost (dimension)
WHERE
    part.oid = to_regclass('elizasql.' || elizasql.partition_of(:agent_id)) AND pg_has_role(part.relowner, 'USAGE');
