-- Memories: what an agent said, heard, read and knows. Columns of a memory, in the order of elizasql.models.Memory:
-- id, entity_id, agent_id, room_id, world_id, type, content, metadata, "unique", created_at, embedding.
-- A read takes the embedding from a sub-select that runs only when it is asked for, and takes the one of the width in
-- force, whichever that is. Order is total everywhere. Times are the statement's, not the transaction's: memories of one
-- transaction stay in the order of their making.
-- One statement per access path: with a generic plan, "(:room_id IS NULL OR room_id = :room_id)" would scan the table.
-- Where policies guard the rows, a scan is bound only by comparisons that PostgreSQL knows to be leakproof: of a column, or
-- greatest() of one, with a plain value. Hence bounds of time are sub-selects, since coalesce() is none of these, and
-- what would be looked up by an index on a function is asked for in another way there (row_security_active).

-- name: create_memory(agent_id, id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata)!
-- Stores one memory without an embedding. An id that is there already keeps its row.
INSERT INTO elizasql.memories (
    agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
)
VALUES (
    :agent_id, :id, :type, elizasql.made_time(:created_at::timestamptz, statement_timestamp()), :content, :entity_id,
    :room_id, :world_id, :is_unique, :metadata
)
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: create_memory_with_embedding(agent_id, id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata, embedding, indexed)!
-- Stores one memory and its embedding, both or neither.
WITH created AS (
    INSERT INTO elizasql.memories (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    VALUES (
        :agent_id, :id, :type, elizasql.made_time(:created_at::timestamptz, statement_timestamp()), :content,
        :entity_id, :room_id, :world_id, :is_unique, :metadata
    )
    ON CONFLICT (agent_id, id) DO NOTHING
    RETURNING agent_id, id, type, room_id, world_id, entity_id, "unique"
)

INSERT INTO elizasql.embeddings (
    agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
)
SELECT
    agent_id, id, type, room_id, world_id, entity_id, "unique", 384, :indexed, :embedding
FROM created;

-- name: create_memories(agent_id, ids, types, created_ats, contents, entity_ids, room_ids, world_ids, uniques, metadatas, embeddings, positions, begins, indexed)!
-- Stores many memories with the embeddings that they have, all or none. "unique" is given for each.
-- Memories without a time get the batch's, as many microseconds later as their position in the batch says: their order
-- stays the input's. begins: this is the first chunk of the batch.
WITH given AS (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins)) + position * interval '1 microsecond' AS made_at
    FROM unnest(
        :ids::uuid[], :types::text[], :created_ats::timestamptz[], :contents::jsonb[], :entity_ids::uuid[],
        :room_ids::uuid[], :world_ids::uuid[], :uniques::boolean[], :metadatas::jsonb[], :embeddings::vector[],
        :positions::bigint[]
    ) AS g (id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata, embedding, position)
),

created AS (
    INSERT INTO elizasql.memories (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    SELECT
        :agent_id,
        id,
        type,
        elizasql.made_time(created_at, made_at),
        content,
        entity_id,
        room_id, world_id, is_unique, metadata
    FROM given
    ORDER BY id
    ON CONFLICT (agent_id, id) DO NOTHING
    RETURNING id, "unique"
)

INSERT INTO elizasql.embeddings (
    agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
)
SELECT
    :agent_id, g.id, g.type, g.room_id, g.world_id, g.entity_id, created."unique", 384, :indexed, g.embedding
FROM given AS g
INNER JOIN created ON g.id = created.id
WHERE g.embedding IS NOT NULL;

-- name: find_near_duplicates(agent_id, ids, types, entity_ids, room_ids, world_ids, uniques, embeddings, lock_types, lock_rooms)
-- Which of a batch are near-duplicates of what is there already, in its order; NULL for one whose id is there. Only where
-- uniques has NULL they are looked for. In the transaction that creates them: it holds the locks to its end.
SELECT
    elizasql.near_duplicates_384(
        :agent_id, :ids::uuid[], :types::text[], :room_ids::uuid[], :world_ids::uuid[], :entity_ids::uuid[],
        :embeddings::vector[], :uniques::boolean[], :lock_types::text[], :lock_rooms::uuid[]
    ) AS near;

-- name: create_memories_marking_duplicates(agent_id, ids, types, created_ats, contents, entity_ids, room_ids, world_ids, uniques, metadatas, embeddings, positions, begins, indexed, lock_types, lock_rooms)!
-- As create_memories, and a NULL in uniques is decided here: false for a near-duplicate of what is there already. For a
-- batch of one chunk in which no two are alike.
-- The function takes locks and looks anew after it has them, which one statement alone cannot do.
-- lock_types, lock_rooms: with the first chunk of a batch, each pair that the batch looks into.
WITH verdict AS MATERIALIZED (
    SELECT
        elizasql.near_duplicates_384(
            :agent_id, :ids::uuid[], :types::text[], :room_ids::uuid[], :world_ids::uuid[], :entity_ids::uuid[],
            :embeddings::vector[], :uniques::boolean[], :lock_types::text[], :lock_rooms::uuid[]
        ) AS duplicates
),

given AS (
    SELECT
        g.*,
        (SELECT elizasql.batch_time(:begins)) + g.position * interval '1 microsecond' AS made_at
    FROM verdict, unnest(
        :ids::uuid[], :types::text[], :created_ats::timestamptz[], :contents::jsonb[], :entity_ids::uuid[],
        :room_ids::uuid[], :world_ids::uuid[], :uniques::boolean[], :metadatas::jsonb[], :embeddings::vector[],
        :positions::bigint[], verdict.duplicates
    ) AS g (
        id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata, embedding, position,
        is_duplicate
    )
),

created AS (
    INSERT INTO elizasql.memories (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    SELECT
        :agent_id,
        id,
        type,
        elizasql.made_time(created_at, made_at),
        content,
        entity_id,
        room_id, world_id, coalesce(is_unique, NOT is_duplicate, TRUE), metadata
    FROM given
    ORDER BY id
    ON CONFLICT (agent_id, id) DO NOTHING
    RETURNING id, "unique"
)

INSERT INTO elizasql.embeddings (
    agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
)
SELECT
    :agent_id, g.id, g.type, g.room_id, g.world_id, g.entity_id, created."unique", 384, :indexed, g.embedding
FROM given AS g
INNER JOIN created ON g.id = created.id
WHERE g.embedding IS NOT NULL;

-- name: load_memories(agent_id, ids, types, created_ats, contents, entity_ids, room_ids, world_ids, uniques, metadatas, embeddings, positions, begins, skip)
-- As create_memories, for a bulk load: gives how many were stored, how many vectors with them, and how many of these
-- went past the tail.
-- skip: what is there already keeps its row; otherwise it undoes the statement.
-- While the partition has its HNSW index, vectors go to the tail. Where a load has dropped it they count as indexed from
-- the start, and the index that is built in the end has them: to mark them then would write each row and its b-tree
-- entries a second time, 160 us a row, and leave a heap of twice the size.
-- COPY is no faster: 4,000 rows in thousands, medians of six, us a row: this form 245-269, COPY into both tables 207-217,
-- COPY into a temporary table and INSERT from there 259. What takes the time are foreign keys and b-trees.
-- Not repeatable: a second run finds what the first one stored.
WITH given AS (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins)) + position * interval '1 microsecond' AS made_at
    FROM unnest(
        :ids::uuid[], :types::text[], :created_ats::timestamptz[], :contents::jsonb[], :entity_ids::uuid[],
        :room_ids::uuid[], :world_ids::uuid[], :uniques::boolean[], :metadatas::jsonb[], :embeddings::vector[],
        :positions::bigint[]
    ) AS g (id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata, embedding, position)
),

created AS (
    INSERT INTO elizasql.memories (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    SELECT
        :agent_id,
        id,
        type,
        elizasql.made_time(created_at, made_at),
        content,
        entity_id,
        room_id, world_id, is_unique, metadata
    FROM given
    ORDER BY id
    ON CONFLICT (agent_id, id) DO NOTHING
    RETURNING id
),

embedded AS (
    INSERT INTO elizasql.embeddings (
        agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
    )
    SELECT
        :agent_id, g.id, g.type, g.room_id, g.world_id, g.entity_id, g.is_unique, 384,
        (SELECT to_regclass('elizasql.' || elizasql.partition_of(:agent_id) || '_dim_384_hnsw') IS NULL),
        g.embedding
    FROM given AS g
    INNER JOIN created ON g.id = created.id
    WHERE g.embedding IS NOT NULL
    RETURNING indexed
)

SELECT
    counted.stored,
    (SELECT count(*) FROM embedded) AS embedded,
    (SELECT count(*) FROM embedded WHERE embedded.indexed) AS placed,
    CASE
        WHEN NOT :skip::boolean AND counted.stored < cardinality(:ids::uuid[]) THEN elizasql.refuse_present(
            'memories', ARRAY(SELECT g.id FROM given AS g WHERE g.id NOT IN (SELECT c.id FROM created AS c))
        )
    END AS refused
FROM (SELECT count(*) AS stored FROM created) AS counted;

-- name: upsert_memories(agent_id, ids, types, created_ats, contents, entity_ids, room_ids, world_ids, uniques, keep_unique, metadatas, keep_metadata, embeddings, positions, begins, indexed)!
-- Stores memories or, where the id is there, replaces content, metadata, "unique" and the embedding, each where given.
-- Type, entity, room, world and time of a memory that is there stay. keep_unique, keep_metadata: ids of which that was
-- not given.
WITH given AS (
    SELECT
        *,
        (SELECT elizasql.batch_time(:begins)) + position * interval '1 microsecond' AS made_at
    FROM
        unnest(
            :ids::uuid[], :types::text[], :created_ats::timestamptz[], :contents::jsonb[], :entity_ids::uuid[],
            :room_ids::uuid[], :world_ids::uuid[], :uniques::boolean[], :metadatas::jsonb[], :embeddings::vector[],
            :positions::bigint[]
        ) AS g (id, type, created_at, content, entity_id, room_id, world_id, is_unique, metadata, embedding, position)
    WHERE NOT :indexed::boolean OR (SELECT set_config('elizasql.inline', 'on', TRUE) <> '')
),

stored AS (
    INSERT INTO elizasql.memories AS m (
        agent_id, id, type, created_at, content, entity_id, room_id, world_id, "unique", metadata
    )
    SELECT
        :agent_id,
        id,
        type,
        elizasql.made_time(created_at, made_at),
        content,
        entity_id,
        room_id, world_id, is_unique, metadata
    FROM given
    ORDER BY id
    ON CONFLICT (agent_id, id) DO UPDATE
        SET
            content = excluded.content,
            metadata
            = CASE WHEN excluded.id = ANY(:keep_metadata::uuid[]) THEN m.metadata ELSE excluded.metadata END,
            "unique" = CASE WHEN excluded.id = ANY(:keep_unique::uuid[]) THEN m."unique" ELSE excluded."unique" END
    RETURNING m.id, m.type, m.room_id, m.world_id, m.entity_id, m."unique"
)

INSERT INTO elizasql.embeddings (
    agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
)
SELECT
    :agent_id, stored.id, stored.type, stored.room_id, stored.world_id, stored.entity_id, stored."unique", 384,
    :indexed, g.embedding
FROM given AS g
INNER JOIN stored ON g.id = stored.id
WHERE g.embedding IS NOT NULL
ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE
    SET
        "unique" = excluded."unique",
        indexed = excluded.indexed,
        xid = pg_current_xact_id(),
        dim_384 = excluded.dim_384;

-- name: update_memories(agent_id, ids, contents, metadatas, uniques, entity_ids, room_ids, world_ids, embeddings, indexed, required)
-- Changes the fields that are given, a NULL leaves a field as it is; gives the ids that were there.
-- required: one that is not there undoes the whole statement. A change of scope reaches the embedding by a trigger, which
-- puts it into the tail unless elizasql.inline is on.
WITH given AS (
    SELECT *
    FROM
        unnest(
            :ids::uuid[], :contents::jsonb[], :metadatas::jsonb[], :uniques::boolean[], :entity_ids::uuid[],
            :room_ids::uuid[], :world_ids::uuid[], :embeddings::vector[]
        ) AS g (id, content, metadata, is_unique, entity_id, room_id, world_id, embedding)
    WHERE NOT :indexed::boolean OR (SELECT set_config('elizasql.inline', 'on', TRUE) <> '')
),

updated AS (
    UPDATE elizasql.memories AS m
    SET
        content = coalesce(g.content, m.content),
        metadata = coalesce(g.metadata, m.metadata),
        "unique" = coalesce(g.is_unique, m."unique"),
        entity_id = coalesce(g.entity_id, m.entity_id),
        room_id = coalesce(g.room_id, m.room_id),
        world_id = coalesce(g.world_id, m.world_id)
    FROM given AS g
    WHERE m.agent_id = :agent_id AND m.id = g.id
    RETURNING m.id, m.type, m.room_id, m.world_id, m.entity_id, m."unique"
),

embedded AS (
    INSERT INTO elizasql.embeddings (
        agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, indexed, dim_384
    )
    SELECT
        :agent_id, updated.id, updated.type, updated.room_id, updated.world_id, updated.entity_id, updated."unique",
        384, :indexed, g.embedding
    FROM given AS g
    INNER JOIN updated ON g.id = updated.id
    WHERE g.embedding IS NOT NULL
    ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE
        SET
            indexed = excluded.indexed,
            xid = pg_current_xact_id(),
            dim_384 = excluded.dim_384
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('memories', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: get_memory_by_id(agent_id, id, include_embedding)
SELECT
    id, entity_id, agent_id, room_id, world_id, type, content, metadata, "unique", created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM elizasql.memories AS m
WHERE agent_id = :agent_id AND id = :id;

-- name: get_memories_by_ids(agent_id, ids, type, include_embedding)
-- Those of the ids that are there, newest first; type NULL: of any.
SELECT
    id, entity_id, agent_id, room_id, world_id, type, content, metadata, "unique", created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM elizasql.memories AS m
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid[]) AND (:type::text IS NULL OR type = :type)
ORDER BY created_at DESC, id DESC;

-- name: get_memories_by_room_ids(agent_id, room_ids, type, count, include_embedding)
-- The newest of several rooms: at most count of each come off the index, then count of all.
SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM unnest(:room_ids::uuid[]) AS room (id)
CROSS JOIN
    LATERAL (
        SELECT *
        FROM elizasql.memories AS of_room
        WHERE of_room.agent_id = :agent_id AND of_room.room_id = room.id AND of_room.type = :type
        ORDER BY of_room.created_at DESC, of_room.id DESC
        LIMIT :count::bigint
    ) AS m
ORDER BY m.created_at DESC, m.id DESC
LIMIT :count::bigint;

-- name: get_memories_by_world_id(agent_id, world_ids, type, count, include_embedding)
-- The newest of some worlds: memories that say so themselves, and those in rooms of these worlds.
WITH found AS (
    SELECT
        of_world.id,
        of_world.created_at
    FROM unnest(:world_ids::uuid[]) AS world (id)
    CROSS JOIN
        LATERAL (
            SELECT
                m.id,
                m.created_at
            FROM elizasql.memories AS m
            WHERE m.agent_id = :agent_id AND m.world_id = world.id AND m.type = :type
            ORDER BY m.created_at DESC, m.id DESC
            LIMIT :count::bigint
        ) AS of_world
    UNION
    SELECT
        of_room.id,
        of_room.created_at
    FROM unnest(:world_ids::uuid[]) AS world (id)
    CROSS JOIN
        LATERAL (
            SELECT id FROM elizasql.rooms
            WHERE agent_id = :agent_id AND world_id = world.id
            OFFSET 0
        ) AS room
    CROSS JOIN
        LATERAL (
            SELECT
                m.id,
                m.created_at
            FROM elizasql.memories AS m
            WHERE m.agent_id = :agent_id AND m.room_id = room.id AND m.type = :type
            ORDER BY m.created_at DESC, m.id DESC
            LIMIT :count::bigint
        ) AS of_room
),

newest AS (
    SELECT id FROM found
    ORDER BY created_at DESC, id DESC
    LIMIT :count::bigint
)

SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM newest
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = newest.id
        LIMIT 1
    ) AS m
ORDER BY m.created_at DESC, m.id DESC;

-- name: get_memories(agent_id, type, only_unique, start_time, end_time, cursor_time, cursor_id, metadata, text_contains, skip, count, include_embedding)
-- All of a type, newest first. The time range includes both ends; the cursor is the last row of the page before, whose
-- exact time is read by its id: ElizaOS's JSON carries milliseconds only. greatest(): as the index has it.
-- Cursor and end are one bound, the earlier of the two: of two bounds a scan of the index begins at either, and reads all
-- that is newer than the other.
SELECT
    id, entity_id, agent_id, room_id, world_id, type, content, metadata, "unique", created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM elizasql.memories AS m
WHERE
    agent_id = :agent_id AND type = :type
    AND greatest(created_at) >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
    AND (greatest(created_at), id) < (
        SELECT
            least(page.starts_at, :end_time::timestamptz + interval '1 microsecond'),
            CASE
                WHEN page.starts_at > :end_time THEN '00000000-0000-0000-0000-000000000000'
                ELSE coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
            END
        FROM (
            SELECT
                coalesce(
                    (
                        SELECT exact.created_at FROM elizasql.memories AS exact
                        WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                    ),
                    :cursor_time::timestamptz, 'infinity'
                ) AS starts_at
        ) AS page
    )
    AND ("unique" OR NOT :only_unique)
    AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0)
ORDER BY greatest(created_at) DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: get_memories_of_room(agent_id, room_id, entity_id, world_id, type, only_unique, start_time, end_time, cursor_time, cursor_id, metadata, text_contains, skip, count, include_embedding)
-- As get_memories, in one room. Also for: entity, world.
SELECT
    m.id, m.entity_id, m.agent_id, m.room_id, m.world_id, m.type, m.content, m.metadata, m."unique", m.created_at,
    CASE WHEN :include_embedding THEN (
        SELECT coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
        FROM elizasql.embeddings AS e
        WHERE
            e.agent_id = :agent_id AND e.memory_id = m.id
            AND e.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    ) END AS embedding
FROM elizasql.memories AS m
WHERE
    agent_id = :agent_id AND room_id = :room_id AND type = :type
    AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
    AND (:world_id::uuid IS NULL OR world_id = :world_id)
    AND created_at >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
    AND (created_at, id) < (
        SELECT
            least(page.starts_at, :end_time::timestamptz + interval '1 microsecond'),
            CASE
                WHEN page.starts_at > :end_time THEN '00000000-0000-0000-0000-000000000000'
                ELSE coalesce(:cursor_id::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
            END
        FROM (
            SELECT
                coalesce(
                    (
                        SELECT exact.created_at FROM elizasql.memories AS exact
                        WHERE exact.agent_id = :agent_id AND exact.id = :cursor_id
                    ),
                    :cursor_time::timestamptz, 'infinity'
                ) AS starts_at
        ) AS page
    )
    AND ("unique" OR NOT :only_unique)
    AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0)
ORDER BY created_at DESC, id DESC
LIMIT
    :count::bigint
    OFFSET :skip::bigint;

-- name: count_memories(agent_id, type, only_unique, start_time, end_time, metadata, text_contains)$
SELECT count(*)
FROM elizasql.memories
WHERE
    agent_id = :agent_id AND type = :type
    AND greatest(created_at) >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
    AND greatest(created_at) <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
    AND ("unique" OR NOT :only_unique)
    AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0);

-- name: count_memories_of_rooms(agent_id, room_ids, entity_id, world_id, type, only_unique, start_time, end_time, metadata, text_contains)$
-- Each room is given once. OFFSET 0 keeps it a lookup for each: without statistics all memories of the type were read for
-- one of = ANY(...).
SELECT count(*)
FROM unnest(:room_ids::uuid[]) AS given (id)
CROSS JOIN
    LATERAL (
        SELECT
        FROM elizasql.memories
        WHERE
            agent_id = :agent_id AND room_id = given.id AND type = :type
            AND (:entity_id::uuid IS NULL OR entity_id = :entity_id)
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND created_at >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
            AND created_at <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
            AND ("unique" OR NOT :only_unique)
            AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
            AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0)
        OFFSET 0
    ) AS of_room;

-- name: count_memories_of_entity(agent_id, entity_id, world_id, type, only_unique, start_time, end_time, metadata, text_contains)$
SELECT count(*)
FROM elizasql.memories
WHERE
    agent_id = :agent_id AND entity_id = :entity_id AND type = :type
    AND (:world_id::uuid IS NULL OR world_id = :world_id)
    AND created_at >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
    AND created_at <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
    AND ("unique" OR NOT :only_unique)
    AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0);

-- name: count_memories_of_world(agent_id, world_id, type, only_unique, start_time, end_time, metadata, text_contains)$
SELECT count(*)
FROM elizasql.memories
WHERE
    agent_id = :agent_id AND world_id = :world_id AND type = :type
    AND created_at >= (SELECT coalesce(:start_time::timestamptz, '-infinity'))
    AND created_at <= (SELECT coalesce(:end_time::timestamptz, 'infinity'))
    AND ("unique" OR NOT :only_unique)
    AND (:metadata::jsonb IS NULL OR metadata @> :metadata)
    AND (:text_contains::text IS NULL OR strpos(lower(content ->> 'text'), lower(:text_contains)) > 0);

-- name: delete_memories(agent_id, ids)$
-- Deletes memories, the fragments of those that are documents, and by cascade all their embeddings.
-- Rows are locked in the order of the ids first, for 10 us each: in a small table without statistics the deletion itself
-- reads any index that begins with the agent, in the order of that, and two batches could wait for each other.
-- What has been given to another document while the lock was waited for stays: rows are as they are when locked.
-- Not repeatable: a second run finds nothing left to delete.
WITH doomed AS (
    SELECT id
    FROM unnest(:ids::uuid[]) AS given (id)
    UNION
    SELECT id
    FROM elizasql.memories
    WHERE
        NOT row_security_active('elizasql.memories'::regclass)
        AND agent_id = :agent_id AND metadata ? 'documentId'
        AND left(lower(metadata ->> 'documentId'), 37) = ANY((:ids::uuid[])::text[])
    UNION
    SELECT id
    FROM elizasql.memories
    WHERE
        row_security_active('elizasql.memories'::regclass)
        AND agent_id = :agent_id AND metadata ? 'documentId'
        AND (left(lower(metadata ->> 'documentId'), 37) IN (SELECT unnest(:ids::uuid[])::text)) IS TRUE
),

locked AS MATERIALIZED (
    SELECT
        id,
        left(lower(metadata ->> 'documentId'), 37) AS document_id
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM doomed))
    ORDER BY id
    FOR UPDATE
),

still AS (
    SELECT id
    FROM locked
    WHERE id IN (SELECT unnest(:ids::uuid[])) OR document_id IN (SELECT unnest(:ids::uuid[])::text)
),

deleted AS (
    DELETE FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM still))
    RETURNING id
)

SELECT count(*) FROM deleted;

-- name: delete_all_memories(agent_id, room_ids, type)$
-- Deletes the memories of a type in the rooms, and the fragments of those that are documents, wherever they are.
-- OFFSET 0 keeps it a lookup for each room and each memory: without statistics, or by the average agent's, all memories
-- of the type and all fragments are read to delete one. The order is that of the index of rooms, which no other gives.
-- Locked as by delete_memories; what has moved away while the lock was waited for stays, and so do its fragments.
-- Under policies each lookup of fragments would read all there are: 17,500 memories beside 5,000 fragments took 85 s of
-- processor time, and one read of the fragments in their place 0.34.
-- Not repeatable: a second run finds nothing left to delete.
WITH chosen AS MATERIALIZED (
    SELECT of_room.id
    FROM unnest(:room_ids::uuid[]) AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT id
            FROM elizasql.memories
            WHERE agent_id = :agent_id AND room_id = given.id AND type = :type
            ORDER BY created_at DESC, id DESC
            OFFSET 0
        ) AS of_room
),

doomed AS (
    SELECT id FROM chosen
    UNION
    SELECT fragment.id
    FROM chosen
    CROSS JOIN
        LATERAL (
            SELECT of_document.id
            FROM elizasql.memories AS of_document
            WHERE
                NOT row_security_active('elizasql.memories'::regclass)
                AND of_document.agent_id = :agent_id AND of_document.metadata ? 'documentId'
                AND left(lower(of_document.metadata ->> 'documentId'), 37) = chosen.id::text
            OFFSET 0
        ) AS fragment
    UNION
    SELECT id
    FROM elizasql.memories
    WHERE
        row_security_active('elizasql.memories'::regclass)
        AND agent_id = :agent_id AND metadata ? 'documentId'
        AND (left(lower(metadata ->> 'documentId'), 37) IN (SELECT chosen.id::text FROM chosen)) IS TRUE
),

locked AS MATERIALIZED (
    SELECT
        id,
        room_id = ANY(:room_ids::uuid[]) AND type = :type AS is_there,
        left(lower(metadata ->> 'documentId'), 37) AS document_id
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM doomed))
    ORDER BY id
    FOR UPDATE
),

still AS (
    SELECT id
    FROM locked
    WHERE is_there OR document_id IN (SELECT there.id::text FROM locked AS there WHERE there.is_there)
),

deleted AS (
    DELETE FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM still))
    RETURNING id
)

SELECT count(*) FROM deleted;

-- name: prune_memories(agent_id, type, room_id, before, age, kept_time, kept_id, after_time, after_id, batch_size)^
-- Deletes the oldest memories of a type, where a room is given those of the room, that are before the time, or of the age,
-- and before the oldest one to keep, and the fragments of those that are documents, wherever they are. Gives how many
-- went, whether there may be more, and the last one that was taken, after which the next batch begins: what was deleted
-- stays in the index for as long as anybody has an older snapshot.
-- One of the two branches of "chosen" finds something: each has an index of its own. greatest(): as the index has it.
-- "taken" ends where the fragments come to a batch: a thousand books are a million rows, and whoever waits for one of them
-- would wait for all. The first goes with all that it has. No more are counted than that takes.
-- Locked as by delete_memories; what was changed while the lock was waited for so that it does not fit stays, and so do its
-- fragments, which are found as by delete_all_memories.
-- made_time: a time may be the last of the calendar, and must not become infinite on its way.
-- Not repeatable: a second run finds nothing left to delete.
WITH bounds AS MATERIALIZED (
    SELECT
        coalesce(:before::timestamptz, statement_timestamp() - :age::interval, 'infinity') AS before,
        CASE WHEN :kept_id::uuid IS NULL THEN 'infinity' ELSE elizasql.made_time(:kept_time, 'infinity') END
            AS kept_time,
        coalesce(:kept_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff') AS kept_id,
        CASE WHEN :after_id::uuid IS NULL THEN '-infinity' ELSE elizasql.made_time(:after_time, 'infinity') END
            AS after_time,
        coalesce(:after_id, '00000000-0000-0000-0000-000000000000') AS after_id
),

chosen AS MATERIALIZED (
    (
        SELECT
            id,
            created_at
        FROM elizasql.memories
        WHERE
            :room_id::uuid IS NULL AND agent_id = :agent_id AND type = :type
            AND greatest(created_at) < (SELECT bounds.before FROM bounds)
            AND (greatest(created_at), id) < (SELECT bounds.kept_time, bounds.kept_id FROM bounds)
            AND (greatest(created_at), id) > (SELECT bounds.after_time, bounds.after_id FROM bounds)
        ORDER BY greatest(created_at), id
        LIMIT :batch_size::bigint
    )
    UNION ALL
    (
        SELECT
            id,
            created_at
        FROM elizasql.memories
        WHERE
            agent_id = :agent_id AND room_id = :room_id AND type = :type
            AND created_at < (SELECT bounds.before FROM bounds)
            AND (created_at, id) < (SELECT bounds.kept_time, bounds.kept_id FROM bounds)
            AND (created_at, id) > (SELECT bounds.after_time, bounds.after_id FROM bounds)
        ORDER BY created_at, id
        LIMIT :batch_size
    )
),

counted AS MATERIALIZED (
    (
        SELECT chosen.id AS document_id
        FROM chosen
        CROSS JOIN
            LATERAL (
                SELECT of_document.id
                FROM elizasql.memories AS of_document
                WHERE
                    NOT row_security_active('elizasql.memories'::regclass)
                    AND of_document.agent_id = :agent_id AND of_document.metadata ? 'documentId'
                    AND left(lower(of_document.metadata ->> 'documentId'), 37) = chosen.id::text
                OFFSET 0
            ) AS fragment
        LIMIT :batch_size
    )
    UNION ALL
    SELECT chosen.id AS document_id
    FROM elizasql.memories AS fragment
    INNER JOIN chosen ON left(lower(fragment.metadata ->> 'documentId'), 37) = chosen.id::text
    WHERE
        row_security_active('elizasql.memories'::regclass)
        AND fragment.agent_id = :agent_id AND fragment.metadata ? 'documentId'
),

taken AS MATERIALIZED (
    SELECT
        id,
        created_at
    FROM (
        SELECT
            chosen.id,
            chosen.created_at,
            row_number() OVER in_order AS place,
            sum(coalesce(of_document.fragments, 0)) OVER in_order AS fragments
        FROM chosen
        LEFT JOIN
            (
                SELECT
                    document_id,
                    count(*) AS fragments
                FROM counted
                GROUP BY document_id
            ) AS of_document
            ON chosen.id = of_document.document_id
        WINDOW in_order AS (ORDER BY chosen.created_at, chosen.id)
    ) AS so_far
    WHERE place = 1 OR fragments < :batch_size
),

doomed AS (
    SELECT id FROM taken
    UNION
    SELECT fragment.id
    FROM taken
    CROSS JOIN
        LATERAL (
            SELECT of_document.id
            FROM elizasql.memories AS of_document
            WHERE
                NOT row_security_active('elizasql.memories'::regclass)
                AND of_document.agent_id = :agent_id AND of_document.metadata ? 'documentId'
                AND left(lower(of_document.metadata ->> 'documentId'), 37) = taken.id::text
            OFFSET 0
        ) AS fragment
    UNION
    SELECT id
    FROM elizasql.memories
    WHERE
        row_security_active('elizasql.memories'::regclass)
        AND agent_id = :agent_id AND metadata ? 'documentId'
        AND (left(lower(metadata ->> 'documentId'), 37) IN (SELECT taken.id::text FROM taken)) IS TRUE
),

locked AS MATERIALIZED (
    SELECT
        id,
        created_at,
        type = :type AND (:room_id IS NULL OR room_id = :room_id) AS is_there,
        left(lower(metadata ->> 'documentId'), 37) AS document_id
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM doomed))
    ORDER BY id
    FOR UPDATE
),

there AS MATERIALIZED (
    SELECT locked.id
    FROM locked
    INNER JOIN taken ON locked.id = taken.id AND locked.created_at = taken.created_at
    WHERE locked.is_there
),

still AS (
    SELECT id
    FROM locked
    WHERE id IN (SELECT there.id FROM there) OR document_id IN (SELECT there.id::text FROM there)
),

deleted AS (
    DELETE FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(ARRAY(SELECT id FROM still))
    RETURNING id
)

SELECT
    (SELECT count(*) FROM deleted) AS deleted,
    (SELECT count(*) FROM chosen) = :batch_size OR count(*) < (SELECT count(*) FROM chosen) AS more,
    max(created_at) AS last_time,
    (array_agg(id ORDER BY created_at DESC, id DESC))[1] AS last_id
FROM taken;

-- name: get_cached_embeddings(agent_id, type, lengths_from, lengths_to, most)
-- The texts of a length between the two, and their vectors when they are at most :most.
-- The length bounds the edit distance exactly; the index is on length(content ->> 'text').
-- LIMIT keeps the join a lookup for each memory: without statistics, all vectors of the agent were read for each.
SELECT
    m.id,
    m.content ->> 'text' AS text,
    CASE
        WHEN count(*) OVER () <= :most::bigint
            THEN coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
    END AS embedding
FROM elizasql.memories AS m
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.embeddings AS of_id
        WHERE
            of_id.agent_id = :agent_id AND of_id.memory_id = m.id
            AND of_id.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
        LIMIT 1
    ) AS e
WHERE
    m.agent_id = :agent_id AND m.type = :type AND m.content ? 'text'
    AND length(m.content ->> 'text') BETWEEN :lengths_from::integer AND :lengths_to::integer;

-- name: get_cached_embeddings_by_content(agent_id, type, key, lengths_from, lengths_to, most)
-- As get_cached_embeddings, for another key of the content; no index on its length.
SELECT
    m.id,
    m.content ->> :key AS text,
    CASE
        WHEN count(*) OVER () <= :most::bigint
            THEN coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
    END AS embedding
FROM elizasql.memories AS m
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.embeddings AS of_id
        WHERE
            of_id.agent_id = :agent_id AND of_id.memory_id = m.id
            AND of_id.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
        LIMIT 1
    ) AS e
WHERE
    m.agent_id = :agent_id AND m.type = :type
    AND length(m.content ->> :key) BETWEEN :lengths_from::integer AND :lengths_to::integer;

-- name: get_cached_embeddings_by_metadata(agent_id, type, key, lengths_from, lengths_to, most)
-- As get_cached_embeddings, for a key of the metadata; no index on its length.
SELECT
    m.id,
    m.metadata ->> :key AS text,
    CASE
        WHEN count(*) OVER () <= :most::bigint
            THEN coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072)
    END AS embedding
FROM elizasql.memories AS m
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.embeddings AS of_id
        WHERE
            of_id.agent_id = :agent_id AND of_id.memory_id = m.id
            AND of_id.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
        LIMIT 1
    ) AS e
WHERE
    m.agent_id = :agent_id AND m.type = :type
    AND length(m.metadata ->> :key) BETWEEN :lengths_from::integer AND :lengths_to::integer;

-- name: get_cached_vectors(agent_id, type, ids, texts, key, of_metadata)
-- The vectors of memories that still have the text that was compared: it may have been changed, and its vector with it.
SELECT
    given.id,
    coalesce(e.dim_384, e.dim_512, e.dim_768, e.dim_1024, e.dim_1536, e.dim_3072) AS embedding
FROM unnest(:ids::uuid[], :texts::text[]) AS given (id, text)
CROSS JOIN
    LATERAL (
        SELECT FROM elizasql.memories AS of_id
        WHERE
            of_id.agent_id = :agent_id AND of_id.id = given.id AND of_id.type = :type
            AND CASE WHEN :of_metadata THEN of_id.metadata ELSE of_id.content END ->> :key = given.text
        LIMIT 1
    ) AS m
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.embeddings AS of_id
        WHERE
            of_id.agent_id = :agent_id AND of_id.memory_id = given.id
            AND of_id.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
        LIMIT 1
    ) AS e;
