-- Worlds of the agent.

-- name: get_worlds_by_ids(agent_id, ids)
SELECT id, agent_id, name, message_server_id, metadata, created_at
FROM elizasql.worlds
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid []);

-- name: get_all_worlds(agent_id)
SELECT id, agent_id, name, message_server_id, metadata, created_at
FROM elizasql.worlds
WHERE agent_id = :agent_id
ORDER BY created_at, id;

-- name: create_worlds(agent_id, worlds)!
-- A world that is there already stays as it is.
INSERT INTO elizasql.worlds (agent_id, id, name, message_server_id, metadata, created_at)
SELECT
    :agent_id, id, coalesce(name, ''), message_server_id, coalesce(metadata, '{}'), coalesce(created_at, now())
FROM jsonb_populate_recordset(NULL::elizasql.worlds, :worlds::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: delete_worlds(agent_id, ids)
-- Deletes worlds and their components; rooms and memories stay and no longer point at the world.
DELETE FROM elizasql.worlds
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid [])
RETURNING id;
