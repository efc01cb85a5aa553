-- Components: what is known of an entity, by type. The natural key is the entity, the type, the world and the source
-- entity, the last two with NULL as a value. Columns in the order of elizasql.models.Component. Times are the statement's,
-- as in messaging.sql.

-- name: get_component(agent_id, entity_id, type, world_id, source_entity_id)^
-- The oldest of those that fit; world_id and source_entity_id NULL: any.
SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
FROM elizasql.components
WHERE
    agent_id = :agent_id AND entity_id = :entity_id AND type = :type
    AND (:world_id::uuid IS NULL OR world_id = :world_id)
    AND (:source_entity_id::uuid IS NULL OR source_entity_id = :source_entity_id)
ORDER BY created_at, id
LIMIT 1;

-- name: get_components_for_entities(agent_id, entity_ids, world_id, source_entity_id)
-- Those of each entity, oldest first, in the order of the entities; world_id and source_entity_id NULL: any.
-- OFFSET 0 keeps the join a lookup for each entity: as a join, the plan for the average agent reads all of a large one.
SELECT c.*
FROM unnest(:entity_ids::uuid[]) WITH ORDINALITY AS given (entity_id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
        FROM elizasql.components
        WHERE
            agent_id = :agent_id AND entity_id = given.entity_id
            AND (:world_id::uuid IS NULL OR world_id = :world_id)
            AND (:source_entity_id::uuid IS NULL OR source_entity_id = :source_entity_id)
        OFFSET 0
    ) AS c
ORDER BY given.position, c.created_at, c.id;

-- name: get_components_by_ids(agent_id, ids)
-- In the order of the ids.
SELECT c.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
        FROM elizasql.components
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS c
ORDER BY given.position;

-- name: get_components_by_natural_keys(agent_id, entity_ids, types, world_ids, source_entity_ids)
-- One row for each key, in their order, empty where there is no such component.
SELECT c.*
FROM
    unnest(
        :entity_ids::uuid[], :types::text[], :world_ids::uuid[], :source_entity_ids::uuid[]
    ) WITH ORDINALITY AS given (entity_id, type, world_id, source_entity_id, position)
LEFT JOIN LATERAL (
    SELECT id, agent_id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
    FROM elizasql.components
    WHERE
        agent_id = :agent_id AND entity_id = given.entity_id AND type = given.type
        AND world_id IS NOT DISTINCT FROM given.world_id
        AND source_entity_id IS NOT DISTINCT FROM given.source_entity_id
    LIMIT 1
) AS c ON TRUE
ORDER BY given.position;

-- name: create_components(agent_id, components)^
-- Gives, in the order given, the id of each and whether it is new: what is there already stays, by id or natural key.
-- Not repeatable: a second run finds what the first one made, and says that it was there.
SELECT ids, created FROM elizasql.create_components(:agent_id, :components::jsonb);

-- name: upsert_components(agent_id, components)
-- Creates components, or replaces room and data of those whose natural key is there; gives the ids and natural keys.
INSERT INTO elizasql.components (
    agent_id, id, entity_id, room_id, world_id, source_entity_id, type, data, created_at
)
SELECT
    :agent_id, id, entity_id, room_id, world_id, source_entity_id, type, data,
    coalesce(created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.components, :components::jsonb)
ORDER BY entity_id, type COLLATE "C", world_id, source_entity_id
ON CONFLICT ON CONSTRAINT components_natural_key DO UPDATE SET room_id = excluded.room_id, data = excluded.data
RETURNING id, entity_id, type, world_id, source_entity_id;

-- name: update_components(agent_id, components, required)
-- Changes the fields that are given; gives the ids that were there. required: one that is not undoes the statement.
-- agent_id comes through the join and not as a filter, which keeps it a lookup for each id.
-- Rows are locked in the order of the ids, whatever the plan, so that two batches cannot wait for each other.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, c.*, g.component
    FROM jsonb_array_elements(:components::jsonb) AS g (component)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.components, g.component) AS c
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.components AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.components AS c
    SET
        entity_id = coalesce(g.entity_id, c.entity_id),
        room_id = coalesce(g.room_id, c.room_id),
        world_id = CASE WHEN g.component ? 'world_id' THEN g.world_id ELSE c.world_id END,
        source_entity_id
        = CASE WHEN g.component ? 'source_entity_id' THEN g.source_entity_id ELSE c.source_entity_id END,
        type = coalesce(g.type, c.type),
        data = CASE WHEN g.component ? 'data' THEN coalesce(g.data, '{}') ELSE c.data END
    FROM locked AS g
    WHERE c.agent_id = g.agent AND c.id = g.id
    RETURNING c.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('components', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: patch_components(agent_id, patches)
-- Applies the operations to the data of each component, all or none; a concurrent patch is waited for and built upon.
-- Locked as by update_components.
-- Not repeatable: increments and appends would be done twice.
WITH given AS MATERIALIZED (
    SELECT :agent_id::uuid AS agent, (g.patch ->> 'id')::uuid AS id, g.patch -> 'ops' AS ops
    FROM jsonb_array_elements(:patches::jsonb) AS g (patch)
),

locked AS MATERIALIZED (
    SELECT given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT
            FROM elizasql.components AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

patched AS (
    UPDATE elizasql.components AS c
    SET data = elizasql.patch_data(c.data, g.ops, c.id)
    FROM locked AS g
    WHERE c.agent_id = g.agent AND c.id = g.id
    RETURNING c.id
)

SELECT elizasql.refuse_missing('components', array_agg(g.id)) AS refused
FROM given AS g
WHERE NOT EXISTS (SELECT FROM patched WHERE patched.id = g.id)
HAVING count(*) > 0;

-- name: delete_components(agent_id, ids)$
-- Gives how many there were.
-- Locked as by update_components.
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
            FROM elizasql.components AS of_id
            WHERE of_id.agent_id = given.agent AND of_id.id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.components AS c
    USING locked AS g
    WHERE c.agent_id = g.agent AND c.id = g.id
    RETURNING c.id
)

SELECT count(*) FROM deleted;
