-- Relationships: from a source to a target entity, one for each ordered pair. Columns in the order of
-- elizasql.models.Relationship. Times are the statement's, as in messaging.sql.

-- name: get_relationship(agent_id, source_entity_id, target_entity_id)^
SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
FROM elizasql.relationships
WHERE agent_id = :agent_id AND source_entity_id = :source_entity_id AND target_entity_id = :target_entity_id;

-- name: get_relationships(agent_id, entity_id, tags, reach, count, skipped)
-- Those that come from the entity or go to it and share a tag with tags, oldest first; tags NULL: any. Each side comes
-- off its own index in that order. reach = count + skipped: no side need give more.
SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
FROM (
    (
        SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
        FROM elizasql.relationships
        WHERE
            agent_id = :agent_id AND source_entity_id = :entity_id
            AND (:tags::text[] IS NULL OR tags && :tags)
        ORDER BY created_at, id
        LIMIT :reach::bigint
    )
    UNION ALL
    (
        SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
        FROM elizasql.relationships
        WHERE
            agent_id = :agent_id AND target_entity_id = :entity_id AND source_entity_id <> :entity_id
            AND (:tags::text[] IS NULL OR tags && :tags)
        ORDER BY created_at, id
        LIMIT :reach::bigint
    )
) AS found
ORDER BY created_at, id
LIMIT
    :count::bigint
    OFFSET :skipped::bigint;

-- name: get_relationships_of_entities(agent_id, entity_ids, tags, reach, count, skipped)
-- As get_relationships, of several entities together, each relationship once. reach = count + skipped: no entity need
-- give more.
WITH found AS MATERIALIZED (
    SELECT r.id
    FROM unnest(:entity_ids::uuid[]) AS given (id)
    CROSS JOIN
        LATERAL (
            (
                SELECT id
                FROM elizasql.relationships
                WHERE
                    agent_id = :agent_id AND source_entity_id = given.id AND (:tags::text[] IS NULL OR tags && :tags)
                ORDER BY created_at, id
                LIMIT :reach::bigint
            )
            UNION ALL
            (
                SELECT id
                FROM elizasql.relationships
                WHERE
                    agent_id = :agent_id AND target_entity_id = given.id AND (:tags::text[] IS NULL OR tags && :tags)
                ORDER BY created_at, id
                LIMIT :reach::bigint
            )
        ) AS r
    GROUP BY r.id
)

SELECT r.*
FROM found
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
        FROM elizasql.relationships
        WHERE agent_id = :agent_id AND id = found.id
        LIMIT 1
    ) AS r
ORDER BY r.created_at, r.id
LIMIT
    :count::bigint
    OFFSET :skipped::bigint;

-- name: get_relationships_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id.
SELECT r.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
        FROM elizasql.relationships
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS r
ORDER BY given.position;

-- name: get_relationships_by_pairs(agent_id, source_entity_ids, target_entity_ids)
-- One row for each pair, in their order, empty where there is no such relationship.
SELECT r.*
FROM
    unnest(:source_entity_ids::uuid[], :target_entity_ids::uuid[]) WITH ORDINALITY
        AS given (
            source_entity_id, target_entity_id, position
        )
LEFT JOIN LATERAL (
    SELECT id, agent_id, source_entity_id, target_entity_id, tags, metadata, created_at
    FROM elizasql.relationships
    WHERE
        agent_id = :agent_id AND source_entity_id = given.source_entity_id
        AND target_entity_id = given.target_entity_id
    LIMIT 1
) AS r ON TRUE
ORDER BY given.position;

-- name: create_relationships(agent_id, relationships)^
-- Gives, in the order given, the id of each and whether it is new: what is there already stays, by id or by pair.
-- Not repeatable: a second run finds what the first one made, and says that it was there.
SELECT ids, created FROM elizasql.create_relationships(:agent_id, :relationships::jsonb);

-- name: update_relationships(agent_id, relationships, required)
-- Changes the fields that are given; gives the ids that were there. required: one that is not undoes the statement.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, r.*, g.relationship
    FROM jsonb_array_elements(:relationships::jsonb) AS g (relationship)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.relationships, g.relationship) AS r
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.relationships AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.relationships AS r
    SET
        tags = CASE WHEN g.relationship ? 'tags' THEN coalesce(g.tags, '{}') ELSE r.tags END,
        metadata = CASE WHEN g.relationship ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE r.metadata END
    FROM locked AS g
    WHERE r.agent_id = g.agent AND r.id = g.id
    RETURNING r.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('relationships', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_relationships(agent_id, ids)$
-- Gives how many there were.
-- Locked as by update_relationships.
-- Not repeatable: a second run finds nothing left to delete.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, g.id
    FROM unnest(:ids::uuid[]) AS g (id)
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.relationships AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.relationships AS r
    USING locked AS g
    WHERE r.agent_id = g.agent AND r.id = g.id
    RETURNING r.id
)

SELECT count(*) FROM deleted;
