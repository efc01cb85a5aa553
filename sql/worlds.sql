-- Worlds of the agent. Times are the statement's, as in messaging.sql.

-- name: get_worlds_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id: as a join, or with = ANY, the plan for the average
-- agent reads all worlds of a large one.
SELECT w.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, name, message_server_id, metadata, created_at
        FROM elizasql.worlds
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS w
ORDER BY given.position;

-- name: get_all_worlds(agent_id)
SELECT id, agent_id, name, message_server_id, metadata, created_at
FROM elizasql.worlds
WHERE agent_id = :agent_id
ORDER BY created_at, id;

-- name: create_worlds(agent_id, worlds)!
-- A world that is there already stays as it is.
INSERT INTO elizasql.worlds (agent_id, id, name, message_server_id, metadata, created_at)
SELECT
    :agent_id, id, coalesce(name, ''), message_server_id, coalesce(metadata, '{}'),
    coalesce(created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.worlds, :worlds::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: upsert_worlds(agent_id, worlds)!
-- Creates worlds, or changes the fields that are given of those that are there. worlds: an object by id.
INSERT INTO elizasql.worlds AS w (agent_id, id, name, message_server_id, metadata, created_at)
SELECT
    :agent_id, g.id, coalesce(g.name, ''), g.message_server_id, coalesce(g.metadata, '{}'),
    coalesce(g.created_at, statement_timestamp())
FROM jsonb_each(:worlds::jsonb) AS given (id, world)
CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.worlds, given.world) AS g
ORDER BY g.id
ON CONFLICT (agent_id, id) DO UPDATE
    SET
        name = CASE WHEN (:worlds::jsonb -> excluded.id::text) ? 'name' THEN excluded.name ELSE w.name END,
        message_server_id
        = CASE
            WHEN (:worlds::jsonb -> excluded.id::text) ? 'message_server_id' THEN excluded.message_server_id
            ELSE w.message_server_id
        END,
        metadata
        = CASE
            WHEN (:worlds::jsonb -> excluded.id::text) ? 'metadata' THEN excluded.metadata ELSE w.metadata
        END;

-- name: update_worlds(agent_id, worlds, required)
-- Changes the fields that are given; gives the ids that were there. required: one that is not undoes the statement.
-- Rows are locked in the order of the ids, so that two batches cannot wait for each other, and joined by the whole key,
-- so that each is looked up.
WITH given AS MATERIALIZED (
    SELECT w.*, g.world
    FROM jsonb_array_elements(:worlds::jsonb) AS g (world)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.worlds, g.world) AS w
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id AS agent, given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id
            FROM elizasql.worlds
            WHERE agent_id = :agent_id AND id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.worlds AS w
    SET
        name = CASE WHEN g.world ? 'name' THEN coalesce(g.name, '') ELSE w.name END,
        message_server_id
        = CASE WHEN g.world ? 'message_server_id' THEN g.message_server_id ELSE w.message_server_id END,
        metadata = CASE WHEN g.world ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE w.metadata END,
        created_at = elizasql.changed_time(w.created_at, g.created_at)
    FROM locked AS g
    WHERE w.agent_id = g.agent AND w.id = g.id
    RETURNING w.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('worlds', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_worlds(agent_id, ids, indexed)$
-- Deletes worlds and their components; rooms and memories stay and no longer point at the world; gives how many went.
-- indexed: the vectors of these memories stay in the index, and do not go to the tail.
-- All that changes is locked first, in the order in which others lock it.
-- Not repeatable: a second run finds nothing left to delete.
WITH locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM elizasql.lock_dependents_of_worlds(:agent_id, :ids::uuid[]) AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.worlds
            WHERE agent_id = :agent_id AND id = given.id
            FOR UPDATE
        ) AS of_id
    WHERE NOT :indexed::boolean OR (SELECT set_config('elizasql.inline', 'on', TRUE) <> '')
),

deleted AS (
    DELETE FROM elizasql.worlds AS w
    USING locked
    WHERE w.agent_id = locked.agent_id AND w.id = locked.id
    RETURNING w.id
)

SELECT count(*) FROM deleted;
