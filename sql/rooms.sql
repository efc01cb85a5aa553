-- Rooms of the agent.

-- name: get_rooms_by_ids(agent_id, ids)
SELECT
    id, agent_id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
FROM elizasql.rooms
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid []);

-- name: get_rooms_by_world(agent_id, world_id)
SELECT
    id, agent_id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
FROM elizasql.rooms
WHERE agent_id = :agent_id AND world_id = :world_id
ORDER BY created_at, id;

-- name: create_rooms(agent_id, rooms)!
-- A room that is there already stays as it is.
INSERT INTO elizasql.rooms (
    agent_id, id, name, source, type, channel_id, message_server_id, world_id, metadata, created_at
)
SELECT
    :agent_id, id, name, source, type, channel_id, message_server_id, world_id, coalesce(metadata, '{}'),
    coalesce(created_at, now())
FROM jsonb_populate_recordset(NULL::elizasql.rooms, :rooms::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: delete_rooms(agent_id, ids)
-- Deletes rooms and, by cascade, their participants, memories, logs and components.
DELETE FROM elizasql.rooms
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid [])
RETURNING id;
