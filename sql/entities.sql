-- Entities: the persons and things that the agent knows.

-- name: get_entities_by_ids(agent_id, ids)
SELECT id, agent_id, names, metadata, created_at
FROM elizasql.entities
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid []);

-- name: get_entities_for_room(agent_id, room_id)
SELECT e.id, e.agent_id, e.names, e.metadata, e.created_at
FROM elizasql.participants AS p
INNER JOIN elizasql.entities AS e ON p.entity_id = e.id
WHERE p.agent_id = :agent_id AND p.room_id = :room_id AND e.agent_id = :agent_id
ORDER BY e.created_at, e.id;

-- name: create_entities(agent_id, entities)!
-- An entity that is there already stays as it is.
INSERT INTO elizasql.entities (agent_id, id, names, metadata, created_at)
SELECT
    :agent_id, id, coalesce(names, '{}'), coalesce(metadata, '{}'), coalesce(created_at, now())
FROM jsonb_populate_recordset(NULL::elizasql.entities, :entities::jsonb)
ORDER BY id
ON CONFLICT (agent_id, id) DO NOTHING;

-- name: delete_entities(agent_id, ids)
-- Deletes entities and, by cascade, their components, memberships, relationships, logs and memories.
DELETE FROM elizasql.entities
WHERE agent_id = :agent_id AND id = ANY(:ids::uuid [])
RETURNING id;
