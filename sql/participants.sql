-- Participants: which entities are in which rooms, and how the agent follows a room.

-- name: add_participants(agent_id, room_id, entity_ids)!
-- A membership that is there already stays as it is.
INSERT INTO elizasql.participants (agent_id, room_id, entity_id)
SELECT DISTINCT
    :agent_id::uuid, :room_id::uuid, entity_id
FROM unnest(:entity_ids::uuid []) AS given (entity_id)
ORDER BY entity_id
ON CONFLICT (agent_id, room_id, entity_id) DO NOTHING;

-- name: remove_participant(agent_id, room_id, entity_id)$
DELETE FROM elizasql.participants
WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = :entity_id
RETURNING TRUE;

-- name: get_participants_for_room(agent_id, room_id)
SELECT entity_id
FROM elizasql.participants
WHERE agent_id = :agent_id AND room_id = :room_id
ORDER BY created_at, entity_id;

-- name: get_rooms_for_participants(agent_id, entity_ids)
SELECT DISTINCT room_id
FROM elizasql.participants
WHERE agent_id = :agent_id AND entity_id = ANY(:entity_ids::uuid [])
ORDER BY room_id;

-- name: is_room_participant(agent_id, room_id, entity_id)$
SELECT EXISTS (
    SELECT FROM elizasql.participants
    WHERE agent_id = :agent_id AND room_id = :room_id AND entity_id = :entity_id
);
