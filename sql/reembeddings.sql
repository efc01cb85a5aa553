-- The move of an agent's vectors to another width: filled beside those in force, switched at once, cleaned up behind.
-- Written for dim_384 as the coming width; the loader derives the other five.
--
-- What is left to do is not noted down but looked up: a memory that has a vector of the old width and none of the new
-- that was made of the text that it has now. So a move that was broken off goes on where it stopped, and what is
-- written meanwhile, in whatever way, is found. The text is compared by its hash.

-- name: get_reembedding(agent_id)^
-- The width in force, and the move that is under way: target NULL where only the vectors of `source` are left to drop.
SELECT
    a.embedding_dimension AS locked,
    r.source,
    r.target,
    r.skip_missing,
    r.created_at AS begun
FROM elizasql.agents AS a
LEFT JOIN elizasql.reembeddings AS r ON a.id = r.agent_id
WHERE a.id = :agent_id;

-- name: begin_reembedding(agent_id, target, skip_missing, begun)$
-- Notes down that a move is under way, where none is, and gives when it began, which tells it from all others of this
-- width; the same one goes on. begun: of the one that was under way; where another one is by now, nothing comes back.
INSERT INTO elizasql.reembeddings AS r (agent_id, source, target, skip_missing)
SELECT
    id,
    embedding_dimension,
    :target,
    :skip_missing::boolean
FROM elizasql.agents
WHERE id = :agent_id AND embedding_dimension <> :target::smallint
ON CONFLICT (agent_id) DO UPDATE
    SET skip_missing = excluded.skip_missing
    WHERE r.target = excluded.target AND r.created_at = coalesce(:begun::timestamptz, r.created_at)
RETURNING created_at;

-- name: count_reembedded(agent_id, source, target)^
SELECT
    count(*) FILTER (WHERE dimension = :source::smallint) AS total,
    count(*) FILTER (WHERE dimension = :target::smallint) AS done
FROM elizasql.embeddings
WHERE agent_id = :agent_id;

-- name: get_left_to_embed(agent_id, source, target, first, count)
-- The next memories in the order of their ids that have a text and lack a vector of it.
SELECT
    m.id,
    m.content ->> 'text' AS text,
    hashtextextended(m.content ->> 'text', 0) AS text_hash
FROM elizasql.embeddings AS leaving
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = leaving.memory_id
        LIMIT 1
    ) AS m
WHERE
    leaving.agent_id = :agent_id AND leaving.dimension = :source::smallint AND leaving.memory_id >= :first
    AND m.content ->> 'text' <> ''
    AND NOT EXISTS (
        SELECT FROM elizasql.embeddings AS coming
        WHERE
            coming.agent_id = :agent_id AND coming.memory_id = leaving.memory_id
            AND coming.dimension = :target::smallint
            AND coming.text_hash = hashtextextended(m.content ->> 'text', 0)
    )
ORDER BY leaving.memory_id
LIMIT :count::bigint;

-- name: get_sample_reembedding(agent_id)^
-- A text and the vector that the move has made of it, if there is one.
SELECT
    m.content ->> 'text' AS text,
    coming.dim_384 AS embedding
FROM elizasql.embeddings AS coming
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = coming.memory_id
        LIMIT 1
    ) AS m
WHERE
    coming.agent_id = :agent_id AND coming.dimension = 384
    AND coming.text_hash = hashtextextended(m.content ->> 'text', 0)
LIMIT 1;

-- name: get_textless(agent_id, source)
-- The memories that have a vector of the old width and no text that one of the new could be made of.
SELECT m.id
FROM elizasql.embeddings AS leaving
CROSS JOIN
    LATERAL (
        SELECT * FROM elizasql.memories AS of_id
        WHERE of_id.agent_id = :agent_id AND of_id.id = leaving.memory_id
        LIMIT 1
    ) AS m
WHERE
    leaving.agent_id = :agent_id AND leaving.dimension = :source::smallint
    AND coalesce(m.content ->> 'text', '') = ''
ORDER BY m.id;

-- name: put_reembeddings(agent_id, begun, ids, text_hashes, embeddings)$
-- Stores vectors of the coming width, for the memories whose text is still the one that they were made of; gives their
-- number: none where the move that they were made for was abandoned, also when another one has begun since. The lock on
-- the move's row lasts to the end of it; the locks on the memories see to it that a change of text or scope comes before
-- this or finds what this has stored.
WITH moving AS MATERIALIZED (
    SELECT target FROM elizasql.reembeddings
    WHERE agent_id = :agent_id AND target = 384 AND created_at = :begun
    FOR SHARE
),

given AS (
    SELECT *
    FROM unnest(:ids::uuid[], :text_hashes::bigint[], :embeddings::vector[]) AS g (id, text_hash, embedding)
),

kept AS MATERIALIZED (
    SELECT
        id, type, room_id, world_id, entity_id, "unique",
        hashtextextended(content ->> 'text', 0) AS text_hash
    FROM elizasql.memories
    WHERE agent_id = :agent_id AND id = ANY(:ids::uuid[]) AND EXISTS (SELECT FROM moving)
    ORDER BY id
    FOR SHARE
),

stored AS (
    INSERT INTO elizasql.embeddings (
        agent_id, memory_id, type, room_id, world_id, entity_id, "unique", dimension, text_hash, dim_384
    )
    SELECT
        :agent_id, kept.id, kept.type, kept.room_id, kept.world_id, kept.entity_id, kept."unique", 384,
        kept.text_hash, given.embedding
    FROM kept
    INNER JOIN given ON kept.id = given.id AND kept.text_hash = given.text_hash
    ON CONFLICT (agent_id, memory_id, dimension) DO UPDATE
        SET
            indexed = FALSE,
            xid = pg_current_xact_id(),
            text_hash = excluded.text_hash,
            dim_384 = excluded.dim_384
    RETURNING 1
)

SELECT count(*) FROM stored;

-- name: drop_textless_reembeddings(agent_id, target)!
-- Drops vectors of the coming width whose memories have lost their text since.
SELECT elizasql.drop_textless_reembeddings(:agent_id, :target);

-- name: index_reembeddings(agent_id, target, batch_size)$
-- As index_embeddings, for the coming width alone: what else waits in the tail is not this move's.
SELECT elizasql.index_embeddings(:agent_id, :target, :batch_size);

-- name: hold_partition(agent_id)!
-- Waits for the build of the partition's index, if there is one, and keeps others from beginning it until the transaction
-- ends. Comes before hold_agent: what waits for a build must not have what others need.
SELECT elizasql.hold_partition(:agent_id);

-- name: hold_agent(agent_id)!
-- Keeps everybody else from storing memories and vectors for the agent until the transaction ends. The server does not end
-- it for being idle while the client embeds, which may take long.
SELECT set_config('idle_in_transaction_session_timeout', '0', TRUE)
FROM elizasql.agents
WHERE id = :agent_id
FOR UPDATE;

-- name: hold_texts(agent_id, ids)
-- As get_left_to_embed, of these memories; their texts do not change any more until the transaction ends. What holds the
-- agent does not see to that: a change of text alone asks for nothing of the agent's.
SELECT
    id,
    content ->> 'text' AS text,
    hashtextextended(content ->> 'text', 0) AS text_hash
FROM elizasql.memories
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid[]) AND content ->> 'text' <> ''
ORDER BY id
FOR SHARE;

-- name: switch_dimension(agent_id, source, target, begun)$
-- The coming width is in force from here on, unless another move has begun, and that is given; null otherwise. A trigger
-- refuses it while something is left to embed.
UPDATE elizasql.agents
SET embedding_dimension = :target
WHERE
    id = :agent_id AND embedding_dimension = :source::smallint
    AND EXISTS (SELECT FROM elizasql.reembeddings AS r WHERE r.agent_id = :agent_id AND r.created_at = :begun)
RETURNING TRUE AS switched;

-- name: abandon_reembedding(agent_id)!
-- The vectors of the coming width are to be dropped from here on, and no more of them are taken.
UPDATE elizasql.reembeddings
SET source = target, target = NULL
WHERE agent_id = :agent_id AND target IS NOT NULL;

-- name: get_left_behind(agent_id, source)
-- The memories that have a vector of the width that goes, and none in force.
SELECT leaving.memory_id
FROM elizasql.embeddings AS leaving
WHERE
    leaving.agent_id = :agent_id AND leaving.dimension = :source::smallint
    AND NOT EXISTS (
        SELECT FROM elizasql.embeddings AS kept
        WHERE
            kept.agent_id = :agent_id AND kept.memory_id = leaving.memory_id
            AND kept.dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
    )
ORDER BY leaving.memory_id;

-- name: drop_leaving_embeddings(agent_id, first, batch_size)^
-- Drops the next vectors of the width that goes, in the order of their memories' ids; gives how many, and the last id that
-- was looked at, NULL behind the end: one that somebody else deletes meanwhile is not among those that were dropped.
-- Not repeatable: a second run does not count them.
SELECT
    dropped,
    last
FROM elizasql.drop_leaving_embeddings(:agent_id, :first, :batch_size);

-- name: end_reembedding(agent_id)!
DELETE FROM elizasql.reembeddings AS r
WHERE
    r.agent_id = :agent_id AND r.target IS NULL
    AND NOT EXISTS (
        SELECT FROM elizasql.embeddings AS e WHERE e.agent_id = :agent_id AND e.dimension = r.source
    );

-- name: count_embeddings_by_type(agent_id)
-- The vectors of the width in force.
SELECT
    type,
    count(*) AS vectors
FROM elizasql.embeddings
WHERE
    agent_id = :agent_id
    AND dimension = (SELECT a.embedding_dimension FROM elizasql.agents AS a WHERE a.id = :agent_id)
GROUP BY type
ORDER BY type;
