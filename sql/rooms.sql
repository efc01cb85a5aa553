-- Rooms of the agent. Times are the statement's, as in messaging.sql.

-- name: get_rooms_by_ids(agent_id, ids)
-- In the order of the ids. LIMIT keeps the join a lookup for each id: as a join, or with = ANY, the plan for the average
-- agent reads all rooms of a large one.
SELECT r.*
FROM unnest(:ids::uuid[]) WITH ORDINALITY AS given (id, position)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
        FROM elizasql.rooms
        WHERE agent_id = :agent_id AND id = given.id
        LIMIT 1
    ) AS r
ORDER BY given.position;

-- name: get_rooms_by_world(agent_id, world_id)
SELECT
    id, agent_id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
FROM elizasql.rooms
WHERE agent_id = :agent_id AND world_id = :world_id
ORDER BY created_at, id;

-- name: get_rooms_by_worlds(agent_id, world_ids, reach, count, skipped)
-- The oldest rooms of several worlds together. reach = count + skipped: no world need give more.
SELECT r.*
FROM unnest(:world_ids::uuid[]) AS given (id)
CROSS JOIN
    LATERAL (
        SELECT id, agent_id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
        FROM elizasql.rooms
        WHERE agent_id = :agent_id AND world_id = given.id
        ORDER BY created_at, id
        LIMIT :reach::bigint
    ) AS r
ORDER BY r.created_at, r.id
LIMIT
    :count::bigint
    OFFSET :skipped::bigint;

-- name: create_rooms(agent_id, rooms)!
-- A room that is there already stays as it is.
INSERT INTO elizasql.rooms (
    agent_id, id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
)
SELECT
    :agent_id, id, name, source, type, channel_id, message_server_id, world_id, coalesce(metadata, '{}'),
    coalesce(created_at, statement_timestamp())
FROM jsonb_populate_recordset(NULL::elizasql.rooms, :rooms::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: upsert_rooms(agent_id, rooms)!
-- Creates rooms, or changes the fields that are given of those that are there. rooms: an object by id.
INSERT INTO elizasql.rooms AS r (
    agent_id, id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
)
SELECT
    :agent_id, g.id, g.name, g.source, g.type, g.channel_id, g.message_server_id, g.world_id,
    coalesce(g.metadata, '{}'), coalesce(g.created_at, statement_timestamp())
FROM jsonb_each(:rooms::jsonb) AS given (id, room)
CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.rooms, given.room) AS g
ORDER BY g.id
ON CONFLICT (agent_id, id) DO UPDATE
    SET
        name = CASE WHEN (:rooms::jsonb -> excluded.id::text) ? 'name' THEN excluded.name ELSE r.name END,
        source = excluded.source,
        type = excluded.type,
        channel_id
        = CASE
            WHEN (:rooms::jsonb -> excluded.id::text) ? 'channel_id' THEN excluded.channel_id
            ELSE r.channel_id
        END,
        message_server_id
        = CASE
            WHEN (:rooms::jsonb -> excluded.id::text) ? 'message_server_id' THEN excluded.message_server_id
            ELSE r.message_server_id
        END,
        world_id
        = CASE
            WHEN (:rooms::jsonb -> excluded.id::text) ? 'world_id' THEN excluded.world_id ELSE r.world_id
        END,
        metadata
        = CASE
            WHEN (:rooms::jsonb -> excluded.id::text) ? 'metadata' THEN excluded.metadata ELSE r.metadata
        END;

-- name: update_rooms(agent_id, rooms, required)
-- Changes the fields that are given; gives the ids that were there. required: one that is not undoes the statement.
-- Rows are locked in the order of the ids, so that two batches cannot wait for each other, and joined by the whole key,
-- so that each is looked up.
WITH given AS MATERIALIZED (
    SELECT r.*, g.room
    FROM jsonb_array_elements(:rooms::jsonb) AS g (room)
    CROSS JOIN LATERAL jsonb_populate_record(NULL::elizasql.rooms, g.room) AS r
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id AS agent, given.*
    FROM given
    CROSS JOIN
        LATERAL (
            SELECT agent_id
            FROM elizasql.rooms
            WHERE agent_id = :agent_id AND id = given.id
            FOR NO KEY UPDATE
        ) AS of_id
),

updated AS (
    UPDATE elizasql.rooms AS r
    SET
        name = CASE WHEN g.room ? 'name' THEN g.name ELSE r.name END,
        source = coalesce(g.source, r.source),
        type = coalesce(g.type, r.type),
        channel_id = CASE WHEN g.room ? 'channel_id' THEN g.channel_id ELSE r.channel_id END,
        message_server_id
        = CASE WHEN g.room ? 'message_server_id' THEN g.message_server_id ELSE r.message_server_id END,
        world_id = CASE WHEN g.room ? 'world_id' THEN g.world_id ELSE r.world_id END,
        metadata = CASE WHEN g.room ? 'metadata' THEN coalesce(g.metadata, '{}') ELSE r.metadata END,
        created_at = elizasql.changed_time(r.created_at, g.created_at)
    FROM locked AS g
    WHERE r.agent_id = g.agent AND r.id = g.id
    RETURNING r.id
)

SELECT id FROM updated
UNION ALL
SELECT elizasql.refuse_missing('rooms', array_agg(g.id))
FROM given AS g
WHERE :required AND NOT EXISTS (SELECT FROM updated WHERE updated.id = g.id)
HAVING count(*) > 0;

-- name: delete_rooms(agent_id, ids)$
-- Deletes rooms and, by cascade, their participants, memories, logs, goals and components; gives how many went.
-- All is locked first, in the order in which others lock it.
-- Not repeatable: a second run finds nothing left to delete.
WITH locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM elizasql.lock_dependents(:agent_id, :ids::uuid[], '{}') AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.rooms
            WHERE agent_id = :agent_id AND id = given.id
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.rooms AS r
    USING locked
    WHERE r.agent_id = locked.agent_id AND r.id = locked.id
    RETURNING r.id
)

SELECT count(*) FROM deleted;

-- name: delete_rooms_by_world_ids(agent_id, world_ids)$
-- Deletes the rooms of worlds, as delete_rooms does; gives how many went.
-- Not repeatable: a second run finds nothing left to delete.
WITH given AS MATERIALIZED (
    SELECT r.id
    FROM unnest(:world_ids::uuid[]) AS w (id)
    CROSS JOIN
        LATERAL (
            SELECT id
            FROM elizasql.rooms
            WHERE agent_id = :agent_id AND world_id = w.id
            OFFSET 0
        ) AS r
    ORDER BY r.id
),

locked AS MATERIALIZED (
    SELECT of_id.agent_id, of_id.id
    FROM elizasql.lock_dependents(:agent_id, ARRAY(SELECT given.id FROM given), '{}') AS given (id)
    CROSS JOIN
        LATERAL (
            SELECT agent_id, id
            FROM elizasql.rooms
            WHERE agent_id = :agent_id AND id = given.id AND world_id = ANY(:world_ids::uuid[])
            FOR UPDATE
        ) AS of_id
),

deleted AS (
    DELETE FROM elizasql.rooms AS r
    USING locked
    WHERE r.agent_id = locked.agent_id AND r.id = locked.id
    RETURNING r.id
)

SELECT count(*) FROM deleted;
